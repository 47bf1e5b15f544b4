"""Plans that compute activations again: what that costs, when it is chosen, and what is said of it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_beit.engine.command_line import parse_as
from fused_beit.engine.config import ModelSettings
from fused_beit.engine.models import MaskedImageModel
from fused_beit.engine.models.flops import recomputed_flops
from fused_beit.engine.planning.choice import choose, describe, shardings, way, ways
from fused_beit.engine.planning.settings import PlanSettings, check, resolve_gpu
from fused_beit.engine.planning.text import choice
from fused_beit.engine.tokenizer.flops import DALLE, size_of

BASE = ["--preset", "beit_base_in1k_800ep"]
LARGE = ["--preset", "beit_large_in1k_800ep"]
# On 8 GPUs of 24 GB, of which one takes less than a picture of this size.
TALL = [*LARGE, "--gpu", "rtx4090", "--gpus", "8", "--data.image_size", "1120", "--mask.num_patches", "1875"]


def planned(*argv: str) -> PlanSettings:
    return parse_as(PlanSettings, argv, description="", check=check)


def chosen(*argv: str):
    settings = planned(*argv)
    return choose(settings, resolve_gpu(settings), size_of(settings.tokenizer), settings.gpus)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_what_is_computed_again_is_what_torch_counts_more(recompute, stage, monkeypatch):
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    settings = ModelSettings(width=16, depth=3, num_heads=2, patch_size=8)
    if stage == 3:  # DeepSpeed's own linear, as it is there
        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    batch = (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(4).repeat(2, 1), torch.zeros(2, 16).long())
    counted = {}
    for what in ("none", recompute):
        model = MaskedImageModel(settings, 32, 16, normalize="inception", impl="reference")
        model.encoder.recompute(what)
        with FlopCounterMode(display=False) as counter:
            model(*batch).loss.backward()
        counted[what] = counter.get_total_flops()
    more = recomputed_flops(settings, 32, 4, recompute, zero_stage=stage)
    assert counted[recompute] - counted["none"] == 2 * more
    assert (more > 0) == (recompute != "none")


def test_what_fits_without_computing_again_does_so():
    assert {chosen(*preset, "--gpus", gpus).recompute for preset in (BASE, LARGE) for gpus in ("1", "8")} == {"none"}


def test_activations_are_computed_again_where_nothing_else_fits():
    one = chosen(*TALL)
    settings = planned(*TALL)
    assert one.recompute == "block" and one.fits(0.1)
    for stage, offload in shardings(settings, 8):
        how = {"gpus": 8, "stage": stage, "offload": offload, "micro_batch": 1}
        least = way(settings, one.gpu, DALLE, recompute="none", **how)
        assert not least.fits(0.1)
    assert one.time.recomputed > 0
    assert one.time.model_on_device - one.time.recomputed == pytest.approx(
        way(
            settings, one.gpu, DALLE,
            gpus=8, stage=one.stage, offload=False, recompute="none", micro_batch=one.micro_batch,
        ).time.model_on_device
    )  # fmt: skip


def test_activations_are_computed_again_where_larger_passes_make_it_faster():
    """Operations that take long to start make few large passes faster than many small ones."""
    argv = [*BASE, "--gpu", "rtx4090", "--zero.stage", "0", "--hardware.memory_gb", "4.2", "--dispatch_us", "3000"]
    one = chosen(*argv)
    kept = [a for a in ways(planned(*argv), one.gpu, DALLE, 1) if a.recompute == "none" and a.fits(0.1)]
    assert kept and one.recompute != "none"
    assert one.micro_batch > max(a.micro_batch for a in kept)
    assert 1.1 * one.time.total < min(a.time.total for a in kept)


def test_activations_are_computed_again_where_fewer_passes_send_less():
    """Two GPUs a machine and a slow network between: what a pass sends is waited for."""
    one = chosen(*LARGE, "--gpus", "8", "--gpu", "rtx4090")
    assert (one.recompute, one.accumulation) == ("block", 1)
    none = [a for a in ways(planned(*LARGE, "--gpus", "8"), one.gpu, DALLE, 8) if a.recompute == "none"]
    assert 1.1 * one.time.total < min(a.time.total for a in none if a.fits(0.1))


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_what_is_asked_to_be_computed_again_is_kept_and_said(recompute):
    argv = [*BASE, "--train.recompute", recompute]
    one, plain = chosen(*argv), chosen(*BASE)
    assert one.recompute == recompute
    assert one.micro_batch >= plain.micro_batch
    assert f"(--train.recompute {recompute})" in choice(planned(*argv), one)["recomputed"]
    assert f"and --train.recompute {recompute} with passes" in describe(one)
    assert "recompute" not in describe(plain)


def test_traffic_has_more_of_a_backward_pass_to_hide_behind_where_it_computes_again():
    slow = (*BASE, "--gpus", "8", "--zero.stage", "1", "--train.micro_batch", "256", "--hardware.node_link_gb_s", "5")
    plain, again = chosen(*slow), chosen(*slow, "--train.recompute", "block")
    assert plain.time.waits - again.time.waits == pytest.approx(again.time.recomputed)
