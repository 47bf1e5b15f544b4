"""Liger's Triton kernels (`liger-kernel`) as providers: its LayerNorm, and its linear with cross-entropy.

Neither is the whole of ours. Its LayerNorm follows LayerScale, DropPath and the add by torch; its loss makes the logits
of some rows at a time, as ours does, and waits for the device to count the targets.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Function, Inputs, Work, work_by
from .rounds import AbsentError


def functions(device: torch.device) -> Any:
    """Its autograd functions. Raises AbsentError where it is not installed or has no GPU."""
    if device.type != "cuda":
        raise AbsentError(f"Liger's kernels are Triton's, and the tensors are on {device.type}")
    try:
        return importlib.import_module("liger_kernel.ops")
    except ImportError as error:
        raise AbsentError(f"Liger cannot be imported (pip install liger-kernel): {error}") from None


def by(make: Callable[[Any], Function]) -> Callable[[Inputs], Work]:
    """A provider's `make`, of what makes a function of the case's tensors from Liger's functions."""
    return lambda inputs: work_by(inputs, make(functions(inputs.device)))


def residual_norm(ops: Any, eps: float) -> Function:
    def one_after_another(
        x: Tensor, y: Tensor, gamma: Tensor, keep: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = x + (gamma * y) * keep[:, None, None]
        return x, ops.LigerLayerNormFunction.apply(x, weight, bias, eps)

    return one_after_another


def token_loss(ops: Any) -> Function:
    """With gradients of weight and bias summed in fp32, as ours are."""

    def loss_and_accuracy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        said = (None, -100, 0.0, 0.0, "mean", None)  # no weights of classes, which targets to ignore, no smoothing, ...
        loss, _, accuracy, _ = ops.LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, bias, *said, False, torch.float32, False, True
        )
        return loss, accuracy.detach()

    return loss_and_accuracy
