"""What an operator whose gradient is a kernel says to whoever wants another derivative of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient, unchanged, that depends on `sources` in a way that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, operator: str, grad: Tensor, *sources: Tensor | None) -> Tensor:
        ctx.operator = operator
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.operator}: impl='triton' has no second derivative, which create_graph=True led to; "
            f"use impl='reference'"
        )


def differentiable_once(operator: str, grads: Sequence[Tensor | None], *sources: Tensor | None) -> list[Tensor | None]:
    """The gradients that a backward returns, made to raise RuntimeError where they are differentiated themselves.

    sources: what they were computed from: the gradient of the output, and the inputs

    Without it a gradient made under create_graph=True would be a constant to autograd, and a second derivative wrong
    without a word.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    return [None if grad is None else _NoSecondDerivative.apply(operator, grad, *sources) for grad in grads]


def refuse_other_derivatives(operator: str, *inputs: Tensor | None) -> None:
    """Raise RuntimeError for a derivative that no kernel gives: of forward mode, or of a torch.func transform.

    A tangent would be lost without a word; torch.func would stop with a sentence about autograd.Function.
    """
    given = [tensor for tensor in inputs if tensor is not None]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise RuntimeError(f"{operator}: impl='triton' has no forward-mode derivative; use impl='reference'")
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if differentiated and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{operator}: impl='triton' has no gradient in torch.func transforms; use impl='reference', or "
            f"torch.autograd.grad"
        )
