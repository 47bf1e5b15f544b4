"""Work and size, counted from settings, against published figures and against the built model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_beit.engine.config import ModelSettings
from fused_beit.engine.models import MaskedImageModel, parameter_count, pretraining_flops

BASE = ModelSettings()
LARGE = ModelSettings(width=1024, depth=24, num_heads=16, layer_scale=1e-5)
TINY = ModelSettings(width=192, depth=12, num_heads=3)
SMALL = ModelSettings(width=384, depth=12, num_heads=6)
ODD = ModelSettings(width=24, depth=2, num_heads=3, patch_size=4, mlp_ratio=2.5)


def build(settings: ModelSettings, image_size: int, vocab_size: int) -> MaskedImageModel:
    with torch.device("meta"):
        return MaskedImageModel(settings, image_size, vocab_size, normalize="inception")


@pytest.mark.parametrize(("settings", "count"), [(BASE, 91_965_776), (LARGE, 311_534_016)], ids=["base", "large"])
def test_parameters_are_as_many_as_published(settings, count):
    assert parameter_count(settings, 224, 8192) == count
    assert sum(parameter.numel() for parameter in build(settings, 224, 8192).parameters()) == count


@pytest.mark.parametrize(
    ("settings", "image_size"),
    [
        (TINY, 224),
        (SMALL, 96),
        (ODD, 32),
        (ODD.model_copy(update={"rel_pos_bias": "per_layer", "layer_scale": 0.0}), 32),
        (ODD.model_copy(update={"rel_pos_bias": "none", "abs_pos_embed": True}), 32),
    ],
)
def test_counted_parameters_are_those_of_the_model(settings, image_size):
    model = build(settings, image_size, 50)
    assert parameter_count(settings, image_size, 50) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("settings", "gigaflops"), [(BASE, 104.1), (LARGE, 365.9)], ids=["base", "large"])
def test_flops_are_as_derived_for_base_and_large(settings, gigaflops):
    assert pretraining_flops(settings, 224, 75, 8192) == pytest.approx(gigaflops * 1e9, rel=0.005)


@pytest.mark.parametrize(("settings", "image_size"), [(ODD, 32), (TINY, 96)], ids=["odd", "tiny"])
def test_flops_are_those_torch_counts_in_a_step(settings, image_size):
    num_patches = (image_size // settings.patch_size) ** 2
    model = MaskedImageModel(settings, image_size, 50, normalize="inception")
    pictures = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    positions = torch.arange(7).expand(2, 7)
    tokens = torch.zeros(2, num_patches, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(pictures, positions, tokens).loss.backward()
    assert counter.get_total_flops() == 2 * pretraining_flops(settings, image_size, 7, 50)
