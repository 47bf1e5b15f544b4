"""AdamW's parameter groups, its schedules, and an AdamW that skips a bad gradient without asking the device."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OptimSettings

NO_DECAY = ("pos_embed", "cls_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into decayed and not decayed ones, as published.

    Biases, all vectors (norms, LayerScale, q and v bias), the CLS token and absolute positions are not decayed; the
    mask token, the bias tables and the output layer are (unilm, `optim_factory.get_parameter_groups`).
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or name.endswith(".bias") or name.rpartition(".")[2] in NO_DECAY
        (kept if spared else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "decayed": True},
        {"params": kept, "weight_decay": 0.0, "decayed": False},
    ]


class Schedule:
    """Learning rate and weight decay of every optimizer step.

    Warm-up is `linspace(0, lr, W)`, both ends included; then half a cosine to `min_lr` over the remaining steps
    (unilm, `utils.cosine_scheduler`). Weight decay follows a cosine without warm-up.

    Args:
        optim: the optimizer's settings.
        total_steps: length of the run in optimizer steps.
        steps_per_epoch: optimizer steps in one pass over the pictures.
    """

    def __init__(self, optim: OptimSettings, total_steps: int, steps_per_epoch: int):
        self.optim = optim
        self.total_steps = total_steps
        self.warmup_steps = min(asked_warmup(optim, steps_per_epoch), total_steps)

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        optim, warmup = self.optim, self.warmup_steps
        if step < warmup:
            return optim.lr * step / max(warmup - 1, 1)
        return cosine(optim.lr, optim.min_lr, step - warmup, self.total_steps - warmup)

    def weight_decay(self, step: int) -> float:
        """Weight decay of optimizer step `step`, counted from 0."""
        optim = self.optim
        if optim.weight_decay_end is None:
            return optim.weight_decay
        return cosine(optim.weight_decay, optim.weight_decay_end, step, self.total_steps)

    def apply(self, groups: list[dict[str, Any]], step: int) -> None:
        """Write the values of `step` into an optimizer's parameter groups."""
        lr, weight_decay = self.lr(step), self.weight_decay(step)
        for group in groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def asked_warmup(optim: OptimSettings, steps_per_epoch: int) -> int:
    """Steps of warm-up that the settings ask for, be they more than the run has."""
    return round(optim.warmup_epochs * steps_per_epoch) if optim.warmup_steps is None else optim.warmup_steps


def cosine(start: float, end: float, step: int, length: int) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(length, 1)))


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that clips, and leaves weights and state untouched when the gradient is not finite, on the device.

    DeepSpeed guards its sharded optimizers; at stage 0 it would apply a NaN and clip in extra passes. Here the norm
    decides through `grad_scale` and `found_inf`, which the fused kernel reads itself, so that the host never waits.

    Args:
        groups: parameter groups.
        clip_grad: largest norm of the gradient; None: no clipping.
        kwargs: AdamW's own.

    Attributes:
        grad_norm: fp32 scalar tensor, norm of the last gradient before clipping.
        skipped: fp32 `[3]` tensor: steps skipped in all, the most in a row, and in a row up to now.
    """

    def __init__(self, groups: list[dict[str, Any]], clip_grad: float | None, **kwargs: Any):
        super().__init__(groups, fused=True, **kwargs)
        self.clip_grad = clip_grad
        device = self.param_groups[0]["params"][0].device
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros(3, device=device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = global_norm(grads)
        bad = (~self.grad_norm.isfinite()).float()
        in_a_row = (self.skipped[2] + 1) * bad
        self.skipped = torch.stack([self.skipped[0] + bad, self.skipped[1].maximum(in_a_row), in_a_row])
        self.found_inf = bad
        if self.clip_grad is not None:
            self.grad_scale = ((self.grad_norm + 1e-6) / self.clip_grad).clamp(min=1.0)
        super().step(closure)


def global_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm of all gradients together; fp32 scalar."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())
