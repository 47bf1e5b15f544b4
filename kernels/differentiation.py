"""The gradient of an operator where it is a kernel, and what is said to whoever wants another derivative of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_library = torch.library.Library("fused_beit", "FRAGMENT")


def register_gradient(name: str, grads: Callable[..., tuple[Any, ...]], save: Callable[..., None]) -> None:
    """torch.library.register_autograd for an operator without default arguments, keywords or lists of tensors.

    save:  (ctx, inputs, output), after the operator ran where a gradient may be wanted
    grads: (ctx, gradients of the outputs) -> gradients of the inputs

    `ctx.needs_input_grad` has one more at its end. Torch's own function goes through the schema in every call, to find
    default arguments: that takes longer than all else of the call.
    """
    operator = getattr(torch.ops.fused_beit, name).default
    if any(part.has_default_value() or part.kwarg_only for part in operator._schema.arguments):
        raise ValueError(f"{name}: an operator with default arguments or keywords cannot be given a gradient so")

    def run(keyset: Any, inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx: Any, *inputs_and_keyset: Any) -> Any:
        inputs, keyset = inputs_and_keyset[:-1], inputs_and_keyset[-1]
        output = run(keyset, inputs)
        save(ctx, inputs, output)
        return output

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        return *grads(ctx, *grad_outputs), None

    static = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), static)  # under this name profiles show the backward

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs, keyset)
        return run(keyset, inputs)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


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
    transformed = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
    if transformed and any(tensor.requires_grad for tensor in given):
        raise RuntimeError(
            f"{operator}: impl='triton' has no gradient in torch.func transforms; use impl='reference', or "
            f"torch.autograd.grad"
        )
