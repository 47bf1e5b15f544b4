"""All randomness of the data, as a hash of integers: (seed, epoch, index, purpose) -> numbers.

Nothing holds a state, so neither the number of workers or ranks, nor a resumed run, nor the pictures that happen to
share a batch can change what a picture gets.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

# SplitMix64's constants: increment and the two multipliers of its finaliser (Steele, Lea and Flood, OOPSLA 2014).
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
_ALL_BITS = (1 << 64) - 1

Key = int | NDArray[np.uint64] | NDArray[np.int64]


class Purpose(IntEnum):
    """What a hash is for, so that two uses of the same seed, epoch and index are independent."""

    ORDER = 1
    VIEW = 2
    MASK = 3
    REPLACEMENT = 4
    SPLIT = 5


def hash64(*keys: int) -> int:
    """A number in [0, 2^64) that looks random, from integers (taken modulo 2^64), whose order counts."""
    state = _INCREMENT
    for key in keys:
        state = _take(state, key)
    return state


def hash64_array(*keys: Key) -> NDArray[np.uint64]:
    """`hash64` of each element of integer keys that broadcast together; at least one of them is an array.

    Returns uint64 of the broadcast shape.
    """
    state: NDArray[np.uint64] | int = _INCREMENT
    for key in keys:
        if isinstance(state, int) and isinstance(key, int):
            state = _take(state, key)
            continue
        # At least one dimension: numpy warns when a scalar overflows, and is silent for arrays.
        mixed = np.atleast_1d(_as_uint64(state) ^ _as_uint64(key))
        mixed += np.uint64(_INCREMENT)
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(_MULTIPLY_1)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(_MULTIPLY_2)
        mixed ^= mixed >> np.uint64(31)
        state = mixed
    if isinstance(state, int):
        raise TypeError("hash64_array needs an array among its keys; use hash64 for integers")
    return state


def uniforms(*keys: Key, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1): `count` for each element of the broadcast keys, `[..., count]`; `[count]` for integers."""
    arrays: list[Key] = [key if isinstance(key, int) else key[..., None] for key in keys]
    bits = hash64_array(*arrays, np.arange(count, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(positions: NDArray[np.int64], size: int, *keys: int) -> NDArray[np.int64]:
    """Elements of a permutation of 0 .. size-1, drawn by the keys: where each of `positions` (int64) is sent.

    A Feistel network over the next power of two; what falls outside is sent on until it is inside. It needs neither
    memory nor time for the other positions, so an epoch of 14 million pictures is entered anywhere at once.
    """
    if size < 1 or (len(positions) and not 0 <= positions.min() <= positions.max() < size):
        raise ValueError(f"positions must be in 0 .. {size - 1}; got {positions}")
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << int(low_bits)) - 1), np.uint64((1 << (bits - int(low_bits))) - 1)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        low, high = values[outside] & low_mask, values[outside] >> low_bits
        for round_ in range(0, 8, 2):  # each line can be undone, so the whole is a permutation
            low ^= hash64_array(*keys, round_, high) & low_mask
            high ^= hash64_array(*keys, round_ + 1, low) & high_mask
        values[outside] = (high << low_bits) | low
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _take(state: int, key: int) -> int:
    state = ((state ^ (key & _ALL_BITS)) + _INCREMENT) & _ALL_BITS
    state = ((state ^ (state >> 30)) * _MULTIPLY_1) & _ALL_BITS
    state = ((state ^ (state >> 27)) * _MULTIPLY_2) & _ALL_BITS
    return state ^ (state >> 31)


def _as_uint64(key: Key) -> NDArray[np.uint64] | np.uint64:
    return np.uint64(key & _ALL_BITS) if isinstance(key, int) else np.asarray(key).astype(np.uint64)
