"""Dropped paths: which, how often, and on what they depend."""

import math

import pytest
import torch

from fused_beit.engine.config import ModelSettings
from fused_beit.engine.models import Encoder, MaskedImageModel, keep_scales
from fused_beit.engine.models.drop_path import GOLDEN, MIX_1, MIX_2

SHAPE = ModelSettings(patch_size=4, width=16, depth=3, num_heads=2, drop_path=0.5)
SIGMAS = 5  # of a binomial count: one in two million by chance
NUM_SAMPLES = 20_000


def draws(rates: list[float], seed: int = 0, num_samples: int = NUM_SAMPLES) -> torch.Tensor:
    return keep_scales(torch.arange(num_samples), torch.tensor(rates), seed)


def mix64_in_integers(value: int) -> int:
    """SplitMix64 in Python's unbounded integers."""
    ones = (1 << 64) - 1
    value = (value ^ (value >> 30)) * MIX_1 & ones
    value = (value ^ (value >> 27)) * MIX_2 & ones
    return value ^ (value >> 31)


def assert_is_binomial(count: float, trials: int, probability: float) -> None:
    spread = math.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) <= SIGMAS * spread


def test_draws_are_splitmix64_of_seed_sample_and_branch():
    sample_ids, rates, seed = [0, 1, 77, 2**40 + 3, 2**63 - 1], [0.25, 0.5], 2**63 + 5
    scales = keep_scales(torch.tensor(sample_ids), torch.tensor(rates), seed)
    ones = (1 << 64) - 1
    for column, sample_id in enumerate(sample_ids):
        sample_hash = mix64_in_integers(mix64_in_integers(seed + GOLDEN & ones) + sample_id + GOLDEN & ones)
        for branch in range(4):
            rate = rates[branch // 2]
            draw = mix64_in_integers(mix64_in_integers(sample_hash ^ branch)) >> 40
            expected = 0.0 if draw < rate * 2**24 else 1 / (1 - rate)
            assert scales[branch // 2, branch % 2, column].item() == pytest.approx(expected, rel=1e-7)


def test_scales_are_zero_or_one_over_the_probability_to_keep():
    rates = [0.0, 0.1, 0.3]
    scales = draws(rates)
    assert scales.dtype == torch.float32
    assert scales.shape == (3, 2, NUM_SAMPLES)
    for rate, block in zip(rates, scales, strict=True):
        kept = (1 / (1 - torch.tensor(rate))).item()
        assert set(block.unique().tolist()) == ({0.0, kept} if rate else {1.0})


def test_each_branch_is_dropped_as_often_as_its_rate_says():
    rates = [0.0, 0.05, 0.1, 0.4]
    dropped = (draws(rates) == 0).sum(-1)
    for rate, counts in zip(rates, dropped.tolist(), strict=True):
        for count in counts:
            assert_is_binomial(count, NUM_SAMPLES, rate)


def test_branches_blocks_and_seeds_are_drawn_independently():
    rate = 0.3
    dropped = torch.cat([draws([rate, rate], seed).flatten(0, 1) == 0 for seed in (0, 1)])
    together = (dropped[:, None] & dropped).sum(-1)
    for first in range(len(dropped)):
        for second in range(first):
            assert_is_binomial(together[first, second].item(), NUM_SAMPLES, rate**2)


def test_neighbouring_samples_are_drawn_independently():
    rate = 0.3
    dropped = draws([rate])[0, 0] == 0
    for distance in (1, 2, 64):
        both = dropped[distance:] & dropped[:-distance]
        assert_is_binomial(both.sum().item(), len(both), rate**2)


def test_draws_do_not_depend_on_how_a_batch_is_split():
    rates = torch.tensor([0.1, 0.5])
    ids = torch.arange(100, 164)
    whole = keep_scales(ids, rates, 3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    pieces = torch.cat([keep_scales(piece, rates, 3) for piece in ids[order].split([1, 20, 43])], dim=-1)
    assert torch.equal(pieces, whole[..., order])


def test_draws_leave_torchs_generator_alone():
    before = torch.random.get_rng_state()
    draws([0.5])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.slow
def test_compiled_draws_are_the_same():
    ids, rates = torch.tensor([0, 5, 2**62, 2**63 - 1]), torch.tensor([0.2, 0.5, 0.5])
    compiled = torch.compile(keep_scales, fullgraph=True)(ids, rates, 9)
    assert torch.equal(compiled, keep_scales(ids, rates, 9))


def test_other_shapes_and_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        keep_scales(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3), 0)
    with pytest.raises(TypeError, match="int32"):
        keep_scales(torch.zeros(2, dtype=torch.int32), torch.zeros(3), 0)


def test_rates_rise_linearly_from_zero_to_the_last_block():
    rates = Encoder(SHAPE, 8).drop_path_rates
    torch.testing.assert_close(rates, torch.tensor([0.0, 0.25, 0.5]), rtol=0, atol=0)


def batch_and_model():
    torch.manual_seed(0)
    model = MaskedImageModel(SHAPE.model_copy(update={"layer_scale": 1.0}), 16, 7, normalize="inception")
    pictures = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    positions = torch.arange(5).expand(8, 5)
    tokens = torch.randint(0, 7, (8, 16))
    return model, (pictures, positions, tokens)


def test_nothing_is_dropped_in_evaluation_or_without_sample_ids():
    model, batch = batch_and_model()
    ids = torch.arange(8)
    training = model.train()(*batch).loss
    assert torch.equal(training, model.eval()(*batch, ids, 1).loss)
    assert not torch.equal(training, model.train()(*batch, ids, 1).loss)


def test_loss_with_dropped_paths_depends_on_seed_and_sample_ids_alone():
    model, batch = batch_and_model()
    ids = torch.arange(8)
    loss = model(*batch, ids, 1).loss
    assert torch.equal(loss, model(*batch, ids, 1).loss)
    assert not torch.equal(loss, model(*batch, ids, 2).loss)
    assert not torch.equal(loss, model(*batch, ids + 8, 1).loss)


@pytest.mark.parametrize("branch", ["attn", "mlp"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_dropped_branch_is_left_out_and_gets_no_gradient(layer, branch):
    model, _ = batch_and_model()
    encoder = model.encoder
    keep = torch.ones(3, 2, 2)
    keep[layer, ["attn", "mlp"].index(branch)] = 0
    encoder(torch.rand(2, 3, 16, 16), None, keep).square().sum().backward()
    for number, block in enumerate(encoder.blocks):
        for name, module in (("attn", block.attn.proj), ("mlp", block.mlp.fc2)):
            dropped = (number, name) == (layer, branch)
            assert module.weight.grad.any() != dropped
