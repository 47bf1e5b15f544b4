"""The ZeRO engine on one rank: bad gradients at every stage and precision, and no waiting for the device."""

from unittest import mock

import pytest
import torch
from torch import nn
from waiting import no_waiting

from fused_beit.engine.config import Settings
from fused_beit.engine.errors import UserError
from fused_beit.engine.training import zero


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        loss = self.linear(x).square().mean()
        return loss, loss.detach()


def make_engine(stage, bf16=False, **train):
    settings = Settings.model_validate({"zero": {"stage": stage}, "train": {"global_batch": 4, "threads": 1, **train}})
    torch.manual_seed(0)
    return zero.ZeroEngine(Toy(), settings, zero.start(settings), bf16=bf16)


def step(engine, x):
    loss, _ = engine(x)
    engine.backward(loss)
    engine.step()


def weights(engine):
    return engine.full_state_dict()["linear.weight"].clone()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(stage, bf16, bad):
    engine = make_engine(stage, bf16)
    step(engine, torch.ones(4, 4))
    before = weights(engine)
    step(engine, torch.full((4, 4), bad))
    step(engine, torch.full((4, 4), bad))
    assert torch.equal(weights(engine), before)
    assert [float(count) for count in engine.skipped()] == [2, 2]
    step(engine, torch.ones(4, 4))
    assert not torch.equal(weights(engine), before)
    assert [float(count) for count in engine.skipped()] == [2, 2]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_rank_at_stage_0_exchanges_nothing(accumulation):
    """DeepSpeed would copy all gradients into a buffer and back, to add those of no other rank."""
    engine = make_engine(0, micro_batch=4 // accumulation)
    before = weights(engine)
    called = mock.patch.multiple(zero.collectives(), **dict.fromkeys(zero.COLLECTIVES, refuse))
    with called:
        for _ in range(accumulation):
            step(engine, torch.ones(4 // accumulation, 4))
    assert not torch.equal(weights(engine), before)


def refuse(*args, **kwargs):
    raise AssertionError("a collective was called")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gradients_norm_is_known_before_clipping_at_every_stage(stage):
    engine = make_engine(stage)
    x = 100 * torch.ones(4, 4)
    reference = Toy()
    reference.load_state_dict({n.removeprefix("module."): t for n, t in engine.full_state_dict().items()})
    reference(x)[0].backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    step(engine, x)
    assert float(engine.grad_norm()) == pytest.approx(float(expected), rel=1e-5)


def test_a_step_at_stage_0_never_waits_for_the_device():
    """From stage 1 on DeepSpeed itself reads the overflow flag and the norm once a step."""
    engine = make_engine(0)
    step(engine, torch.ones(4, 4))
    with no_waiting():
        step(engine, torch.ones(4, 4))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"global_batch": 5}, ["train.global_batch = 5", "2 ranks", "such as 4"]),
        ({"global_batch": 8, "micro_batch": 3}, ["train.micro_batch = 3", "divisor of 4", "such as 2"]),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(train, words):
    with pytest.raises(UserError) as caught:
        zero.batch_plan(Settings.model_validate({"train": train}), world_size=2)
    for word in words:
        assert word in str(caught.value)


def test_the_batch_is_split_over_ranks_and_passes():
    settings = Settings.model_validate({"train": {"global_batch": 24, "micro_batch": 3}})
    assert zero.batch_plan(settings, world_size=2) == (3, 4)
