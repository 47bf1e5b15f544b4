"""Block-wise masks: what one costs beside a step of BEiT-base."""

import numpy as np
import pytest

from fused_beit.engine.config import MaskSettings
from fused_beit.engine.data.masking import sample_masks
from fused_beit.engine.data.seeding import hash64_array

GRID = 14
MASKS = {"smoke": 8, "full": 2048}


@pytest.mark.parametrize("num_patches", [75, 120])
def test_masking(benchmark, in_turn, sizes, num_patches):
    seeds = hash64_array(0, np.arange(MASKS[sizes]))
    settings = MaskSettings(num_patches=num_patches)

    positions_BM = sample_masks(GRID, settings, seeds)
    assert positions_BM.shape == (len(seeds), num_patches)
    assert positions_BM.min() >= 0
    assert positions_BM.max() < GRID**2
    assert all(len(set(row)) == num_patches for row in positions_BM.tolist()), "a patch is masked twice"
    assert (sample_masks(GRID, settings, seeds[1:]) == positions_BM[1:]).all(), "a mask depends on its neighbours"

    runs = {"fused_beit": lambda: sample_masks(GRID, settings, seeds)}
    (row,) = in_turn(f"{len(seeds)} masks of {num_patches} of {GRID**2} patches", runs)
    benchmark.extra_info["us per mask"] = 1e6 * float(np.median(row.seconds)) / len(seeds)
