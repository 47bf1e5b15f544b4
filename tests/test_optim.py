"""AdamW's groups and schedules as published, and the step that a bad gradient may not touch."""

import pytest
import torch
from torch import nn

from fused_beit.engine.config import OptimSettings
from fused_beit.engine.training.optim import GuardedAdamW, Schedule, global_norm, parameter_groups


def schedule(total=100, per_epoch=10, **optim) -> Schedule:
    return Schedule(
        OptimSettings.model_validate({"lr": 1.0, "min_lr": 0.1, "warmup_epochs": 2, **optim}), total, per_epoch
    )


def test_warm_up_is_linear_from_zero_to_the_peak_both_included():
    assert [schedule().lr(step) for step in range(20)] == pytest.approx(torch.linspace(0, 1, 20).tolist())


def test_after_warm_up_the_rate_is_half_a_cosine_to_the_minimum():
    rates = [schedule().lr(step) for step in range(20, 100)]
    expected = 0.1 + 0.45 * (1 + torch.cos(torch.pi * torch.arange(80, dtype=torch.float64) / 80))
    assert rates == pytest.approx(expected.tolist())


def test_warm_up_in_steps_replaces_epochs():
    assert schedule(warmup_steps=5).warmup_steps == 5
    assert schedule(warmup_steps=0).lr(0) == 1.0


def test_warm_up_longer_than_the_run_is_cut():
    assert schedule(total=10).lr(9) == 1.0


def test_weight_decay_follows_a_cosine_only_when_an_end_is_given():
    assert {schedule().weight_decay(step) for step in range(100)} == {0.05}
    falling = schedule(weight_decay=0.4, weight_decay_end=0.2)
    assert falling.weight_decay(0) == pytest.approx(0.4)
    assert falling.weight_decay(50) == pytest.approx(0.3)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.mask_token = nn.Parameter(torch.ones(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.ones(1, 3, 4))
        self.gamma_1 = nn.Parameter(torch.ones(4))
        self.relative_position_bias_table = nn.Parameter(torch.ones(7, 2))
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 4)


def test_no_decay_for_vectors_biases_cls_token_and_positions_only():
    model = Toy()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.05)
    assert sorted(names[p] for p in decayed["params"]) == [
        "lm_head.weight",
        "mask_token",
        "relative_position_bias_table",
    ]
    assert len(spared["params"]) == len(names) - 3
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)


def test_the_schedule_leaves_groups_without_decay_alone():
    groups = parameter_groups(Toy(), 0.05)
    schedule(weight_decay=0.4).apply(groups, 30)
    assert [group["weight_decay"] for group in groups] == [0.4, 0.0]
    assert groups[0]["lr"] == groups[1]["lr"] == schedule().lr(30)


def trained(optimizer_of, gradients):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = optimizer_of(model)
    for gradient in gradients:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    return model, optimizer


def guarded(clip_grad):
    return lambda model: GuardedAdamW(parameter_groups(model, 0.05), clip_grad, lr=0.1)


def test_a_finite_gradient_steps_as_plain_adamw_with_clipping():
    class Clipped(torch.optim.AdamW):
        def step(self, closure=None):
            nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 0.5)
            super().step(closure)

    ours, _ = trained(guarded(0.5), [1.0, -2.0, 0.01])
    plain, _ = trained(lambda model: Clipped(parameter_groups(model, 0.05), lr=0.1), [1.0, -2.0, 0.01])
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_state(bad):
    skipped, optimizer = trained(guarded(0.5), [1.0, bad, bad, -2.0, bad])
    clean, _ = trained(guarded(0.5), [1.0, -2.0])
    for a, b in zip(skipped.parameters(), clean.parameters(), strict=True):
        assert torch.equal(a, b)
    assert optimizer.skipped.tolist() == [3, 2, 1]


def test_global_norm_is_the_norm_of_everything_together():
    grads = [torch.full((3,), 2.0), torch.full((2, 2), 1.0)]
    assert float(global_norm(grads)) == pytest.approx(4.0)
