"""The hash that all randomness of the data comes from."""

import numpy as np
import pytest

from fused_beit.engine.data.seeding import hash64, hash64_array, permuted, uniforms


def test_the_hash_never_changes() -> None:
    # Pinned: another value would give every picture another crop and mask, and a resumed run another order.
    assert hash64(0, 1, 2) == 0xDA3826A47A61577A


def test_arrays_are_hashed_as_integers_are() -> None:
    keys = np.array([0, 1, 7, 2**40])
    expected = [hash64(3, int(key), 5) for key in keys]
    assert hash64_array(3, keys, 5).tolist() == expected
    assert hash64_array(-1, np.array([-2]))[0] == hash64(-1, -2)


def test_the_order_of_keys_counts() -> None:
    assert hash64(1, 2) != hash64(2, 1)


def test_one_changed_bit_of_a_key_changes_half_of_the_hash() -> None:
    keys = np.arange(1000)
    flipped = hash64_array(0, keys, 9) ^ hash64_array(0, keys ^ 1, 9)
    bits = np.unpackbits(flipped.view(np.uint8)).mean()
    assert abs(bits - 0.5) < 4.5 * 0.5 / np.sqrt(64 * 500)  # each pair of keys occurs twice


def test_uniforms_fill_the_unit_interval() -> None:
    numbers = uniforms(0, np.arange(1000), count=20)
    assert numbers.shape == (1000, 20)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 19 + 4.5 * np.sqrt(2 * 19)
    assert abs(np.corrcoef(numbers.T)[np.triu_indices(20, 1)]).max() < 4.5 / np.sqrt(1000)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 1025])
def test_an_epoch_visits_every_picture_once(size: int) -> None:
    order = permuted(np.arange(size), size, 0, 0)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_a_position_of_the_order_is_known_without_the_others() -> None:
    order = permuted(np.arange(1000), 1000, 4, 2)
    assert np.array_equal(permuted(np.array([7, 999, 0]), 1000, 4, 2), order[[7, 999, 0]])


def test_orders_look_random() -> None:
    orders = np.stack([permuted(np.arange(100), 100, 0, epoch) for epoch in range(500)])
    assert len(np.unique(orders, axis=0)) == 500
    counts = np.stack([np.bincount(orders[:, position], minlength=100) for position in range(100)])
    chi_square = ((counts - 5) ** 2 / 5).sum()
    degrees = 99 * 99
    assert abs(chi_square - degrees) < 4.5 * np.sqrt(2 * degrees)
    follows = np.mean(orders[:, 1:] == orders[:, :-1] + 1)  # a picture followed by its neighbour: 1 in 100
    assert abs(follows - 0.0099) < 4.5 * np.sqrt(0.0099 / orders[:, 1:].size)
