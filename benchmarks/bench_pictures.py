"""Pictures from files to batches in one process: decoding, the crop, both views, the mask."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fused_beit.engine.config import DataSettings, MaskSettings
from fused_beit.engine.data.folder import ImageFolder
from fused_beit.engine.data.loading import train_loader

SIZES = {
    "smoke": {"pictures": 4, "image_size": 32, "sides": [(100, 75)]},
    "full": {"pictures": 32, "image_size": 224, "sides": [(500, 375), (2000, 1500)]},
}
GRID = 14
TOKEN_STRIDE = 8  # DALL-E's encoder: a token covers 8 x 8 pixels of the token view


def make_pictures(folder: Path, count: int, side: tuple[int, int]) -> Path:
    """JPEGs of soft colours with some noise, about as hard to decode as photographs."""
    generator = np.random.default_rng(0)
    for i in range(count):
        colours = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(colours).resize(side, Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = soft + generator.normal(0, 12, soft.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.jpg", quality=90)
    return folder


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_pictures(benchmark, in_turn, sizes, tmp_path, large):
    size = SIZES[sizes]
    if large >= len(size["sides"]):
        pytest.skip("smoke sizes have one size of picture")
    side, count, image_size = size["sides"][large], size["pictures"], size["image_size"]
    grid = min(GRID, image_size // 16)
    source = ImageFolder(make_pictures(tmp_path, count, side))
    settings = DataSettings(path=tmp_path, image_size=image_size, workers=0)
    masks = MaskSettings(num_patches=max(1, int(0.4 * grid**2)), min_block=min(16, grid))

    def load() -> list:
        loader = train_loader(
            source,
            settings,
            masks,
            grid,
            grid * TOKEN_STRIDE,
            global_batch=count,
            micro_batch=count,
            rank=0,
            world_size=1,
            seed=0,
            start_step=0,
            num_steps=1,
        )
        return list(loader)

    (batch,) = load()
    assert batch.bad == []
    assert batch.patch_view.shape == (count, 3, image_size, image_size)
    assert batch.token_view.shape == (count, 3, grid * TOKEN_STRIDE, grid * TOKEN_STRIDE)
    # Both views are of one crop: shrunk to the same few pixels they look alike.
    views = [torch.nn.functional.adaptive_avg_pool2d(v.float(), 4) for v in (batch.patch_view, batch.token_view)]
    other_crops = (views[0] - views[1].roll(1, dims=0)).abs().mean()
    assert (views[0] - views[1]).abs().mean() < other_crops / 4, "the two views are not of the same crop"

    (row,) = in_turn(f"{count} JPEGs of {side[0]} x {side[1]}, one process", {"fused_beit": load}, rounds=5)
    benchmark.extra_info["pictures/s"] = count / float(np.median(row.seconds))
