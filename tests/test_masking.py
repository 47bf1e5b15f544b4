"""Masks: the published statistics, exact counts, and a mask that depends on its seed alone."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fused_beit.engine.config import MaskSettings
from fused_beit.engine.data.masking import PADDING, sample_masks
from fused_beit.engine.data.seeding import hash64_array

NUM_MASKS = 4000
BEIT_V1 = MaskSettings(exact=False)
SIGMAS = 4.5


def seeds(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return hash64_array(seed, np.arange(count))


@pytest.fixture(scope="module")
def published() -> NDArray[np.int64]:
    return sample_masks(14, BEIT_V1, seeds(NUM_MASKS))


def test_v1_masks_have_the_published_number_of_patches(published: NDArray[np.int64]) -> None:
    # Of 4000 masks of the published generator: mean 74.49, deviation 0.97, 65 to 75, exactly 75 in 67.5 %.
    # Both are samples of 4000, so their difference has twice the variance of one.
    counts = (published != PADDING).sum(1)
    fourth_moment = ((counts - counts.mean()) ** 4).mean()
    error_of_mean = 0.97 * math.sqrt(2 / NUM_MASKS)
    error_of_deviation = math.sqrt((fourth_moment - 0.97**4) * 2 / NUM_MASKS) / (2 * 0.97)
    error_of_share = math.sqrt(0.675 * 0.325 * 2 / NUM_MASKS)
    assert abs(counts.mean() - 74.49) < SIGMAS * error_of_mean
    assert abs(counts.std() - 0.97) < SIGMAS * error_of_deviation
    assert abs((counts == 75).mean() - 0.675) < SIGMAS * error_of_share
    assert counts.max() == 75
    assert 60 <= counts.min() <= 70


def test_v1_masks_the_centre_often_and_the_corners_rarely(published: NDArray[np.int64]) -> None:
    share = np.bincount(published[published != PADDING], minlength=196).reshape(14, 14) / NUM_MASKS
    rounding = 0.005  # the published shares are given to two digits
    for measured, expected, patches in (
        (share[6:8, 6:8].mean(), 0.72, 1),  # the four are masked together
        (share[[0, 0, -1, -1], [0, -1, 0, -1]].mean(), 0.04, 4),
    ):
        error = math.sqrt(expected * (1 - expected) * 2 / NUM_MASKS / patches)
        assert abs(measured - expected) < SIGMAS * error + rounding


@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        (14, MaskSettings()),
        (14, MaskSettings(max_block=30)),
        (8, MaskSettings(num_patches=26, min_block=4)),
        (8, MaskSettings(num_patches=24)),
        (14, MaskSettings(num_patches=1)),
        (14, MaskSettings(num_patches=196)),
        (2, MaskSettings(num_patches=3)),
        (1, MaskSettings(num_patches=1)),
    ],
    ids=str,
)
def test_exact_masks_have_the_same_number_of_different_patches_in_order(grid: int, settings: MaskSettings) -> None:
    masks = sample_masks(grid, settings, seeds(300))
    assert masks.dtype == np.int64
    assert masks.shape == (300, settings.num_patches)
    assert masks.min() >= 0
    assert masks.max() < grid * grid
    assert (np.diff(masks, axis=1) > 0).all()


def test_topping_up_keeps_the_blocks_and_adds_patches_at_random() -> None:
    blocks = sample_masks(14, BEIT_V1, seeds(500))
    topped_up = sample_masks(14, MaskSettings(), seeds(500))
    added: list[int] = []
    for before, after in zip(blocks, topped_up, strict=True):
        kept = set(before[before != PADDING].tolist())
        assert kept <= set(after.tolist())
        added += set(after.tolist()) - kept
    assert len(added) == (blocks == PADDING).sum()
    assert len(set(added)) > 100  # anywhere, not always the same patches


def test_padding_stands_last() -> None:
    masks = sample_masks(14, BEIT_V1, seeds(300))
    padding = masks == PADDING
    assert padding.any()
    assert (padding == np.sort(padding, axis=1)).all()


@pytest.mark.parametrize("num_patches", [1, 2, 5])
def test_no_v1_mask_is_empty(num_patches: int) -> None:
    masks = sample_masks(14, MaskSettings(num_patches=num_patches, exact=False), seeds(300))
    assert (masks[:, 0] != PADDING).all()


def test_a_first_block_is_tried_for_before_a_single_patch_is_masked() -> None:
    # One attempt in some twenty gives a block of at most 5 patches, so ten attempts mostly fail and 200 hardly ever do.
    masks = sample_masks(14, MaskSettings(num_patches=5, exact=False), seeds(300))
    assert (masks[:, 1] != PADDING).mean() > 0.95


@pytest.mark.parametrize("grid", [1, 2])
def test_where_no_block_fits_one_patch_is_masked(grid: int) -> None:
    masks = sample_masks(grid, MaskSettings(num_patches=grid * grid, exact=False), seeds(300))
    assert ((masks != PADDING).sum(1) == 1).all()
    assert set(masks[:, 0]) == set(range(grid * grid))


def test_blocks_have_the_published_ratios() -> None:
    # Blocks of 16 patches, sides 4 sqrt(r) and 4 / sqrt(r) with r in [0.3, 1/0.3], rounded: 7 x 2 to 2 x 7. The
    # two patches that 7 x 2 = 14 leaves over may make its long side 8.
    masks = sample_masks(14, MaskSettings(num_patches=16, max_block=16, exact=False), seeds(2000))
    shapes = set()
    for mask in masks:
        rows, columns = np.divmod(mask[mask != PADDING], 14)
        height, width = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
        if height * width == len(rows):  # a whole block and nothing else
            shapes.add((height, width))
    assert max(max(shape) for shape in shapes) <= 8
    assert {(7, 2), (2, 7), (4, 4)} <= shapes


def test_blocks_are_no_larger_than_asked() -> None:
    masks = sample_masks(14, MaskSettings(num_patches=4, min_block=4, max_block=4, exact=False), seeds(300))
    spans = []
    for mask in masks:
        rows, columns = np.divmod(mask[mask != PADDING], 14)
        spans.append((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    assert np.median(spans) == 4  # one block of four patches: 2 x 2, or 1 x 4 in either direction


@pytest.mark.parametrize("exact", [True, False])
def test_a_mask_depends_on_its_seed_alone(exact: bool) -> None:
    settings = MaskSettings(exact=exact)
    together = sample_masks(14, settings, seeds(64))
    order = np.random.default_rng(0).permutation(64)
    shuffled = sample_masks(14, settings, seeds(64)[order])
    alone = np.concatenate([sample_masks(14, settings, seeds(64)[i : i + 1]) for i in range(64)])
    assert np.array_equal(shuffled, together[order])
    assert np.array_equal(alone, together)
    assert len(np.unique(together, axis=0)) == 64


def test_more_patches_than_the_picture_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 \.\. 16; got 17"):
        sample_masks(4, MaskSettings(num_patches=17), seeds(1))
