"""The Triton kernels as operators of torch: schemas, shapes, gradients. Importing this imports no triton."""

import functools
from typing import Any

import torch
from torch import Tensor

from .._triton.target import why_unavailable
from ..differentiation import differentiable_once, refuse_other_derivatives, register_gradient
from ..impl import Impl, ImplUnavailable, refusal
from ..precision import accumulate_dtype, compute_dtype

NORM_FORWARD = (
    "(Tensor x, Tensor y, Tensor? gamma, Tensor? keep, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) "
    "-> (Tensor x_new, Tensor normed, Tensor mean, Tensor rstd)"
)
ADD_FORWARD = "(Tensor x, Tensor y, Tensor? gamma, Tensor? keep) -> Tensor"
BACKWARD = (
    "(Tensor? grad_x_new, Tensor? grad_normed, Tensor x_new, Tensor? y, Tensor? gamma, Tensor? keep, Tensor? weight, "
    "Tensor? mean, Tensor? rstd, Tensor(a!)? grad_x, Tensor(b!)? grad_y, Tensor(c!)? grad_gamma, "
    "Tensor(d!)? grad_weight, Tensor(e!)? grad_bias) -> ()"
)

empty_as = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)


def residual_norm_triton(
    x_BND: Tensor,
    y_BND: Tensor,
    gamma_D: Tensor | None,
    keep_B: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(x_new, LayerNorm(x_new)) with x_new = x + keep * gamma * y."""
    dtype = compute_dtype(x_BND)
    _check("residual_norm", keep_B, [dtype], x_BND, y_BND, gamma_D, weight_D, bias_D)
    x_new_BND, normed_BND, _, _ = torch.ops.fused_beit.residual_norm_fwd(
        x_BND, y_BND, gamma_D, keep_B, weight_D, bias_D, eps, dtype
    )
    return x_new_BND, normed_BND


def residual_add_triton(x_BND: Tensor, y_BND: Tensor, gamma_D: Tensor | None, keep_B: Tensor | None) -> Tensor:
    """x + keep * gamma * y in the dtype of x: [B,N,D] -> [B,N,D]."""
    _check("residual_add", keep_B, [], x_BND, y_BND, gamma_D)
    return torch.ops.fused_beit.residual_add_fwd(x_BND, y_BND, gamma_D, keep_B)


def _check(operator: str, keep: Tensor | None, dtypes: list[torch.dtype], *inputs: Tensor | None) -> None:
    """Raise ImplUnavailable where no kernel can run on these tensors, or for a gradient that none gives."""
    given = [tensor for tensor in (*inputs, keep) if tensor is not None]
    why = why_unavailable(given[0].device, *dtypes, *(tensor.dtype for tensor in given))
    if why is not None:
        raise ImplUnavailable(refusal(operator, Impl.TRITON, why))
    if keep is not None and keep.requires_grad and torch.is_grad_enabled():
        why = "keep requires a gradient, and the kernels have none for it; use impl='reference', or keep.detach()"
        raise ImplUnavailable(refusal(operator, Impl.TRITON, why))
    refuse_other_derivatives(operator, *given)


def _empty_norm(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_new and normed [B, N, D], mean and rstd [B, N]."""
    wide = accumulate_dtype(x.dtype)
    num_pictures, num_tokens, _ = x.shape
    mean, rstd = (x.new_empty(num_pictures, num_tokens, dtype=wide) for _ in range(2))
    return empty_as(x), empty_as(x, dtype=dtype), mean, rstd


def _empty_add(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    return empty_as(x)


def _norm_forward(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .launch import residual_fwd

    outputs = _empty_norm(x, y, gamma, keep, weight, bias, eps, dtype)
    if x.numel():
        residual_fwd(x, y, gamma, keep, weight, bias, eps, *outputs)
    return outputs


def _add_forward(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    from .launch import residual_fwd

    x_new = _empty_add(x, y, gamma, keep)
    if x.numel():
        residual_fwd(x, y, gamma, keep, None, None, 0.0, x_new, None, None, None)
    return x_new


def _backward(
    grad_x_new: Tensor | None,
    grad_normed: Tensor | None,
    x_new: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    grad_gamma: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Fill the gradients that are given."""
    from .launch import residual_bwd

    inputs = (grad_x_new, grad_normed, x_new, y, gamma, keep, weight, mean, rstd)
    residual_bwd(*inputs, grad_x, grad_y, grad_gamma, grad_weight, grad_bias)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, y, gamma, keep, weight, bias, _, _ = inputs
    x_new, _, mean, rstd = output
    _save(ctx, y, gamma, keep, weight, bias, x_new, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gamma, keep = inputs
    _save(ctx, y, gamma, keep, None, None, None, None, None)


def _save(ctx: Any, y: Tensor, gamma: Tensor | None, keep: Tensor | None, *others: Tensor | None) -> None:
    """y is kept for the gradient of gamma alone."""
    ctx.set_materialize_grads(False)
    ctx.y_dtype = y.dtype
    ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gamma, keep, *others)


def _norm_grads(
    ctx: Any, grad_x_new: Tensor | None, grad_normed: Tensor | None, grad_mean: None, grad_rstd: None
) -> tuple[Tensor | None, ...]:
    want_x, want_y, want_gamma, _, want_weight, want_bias, *_ = ctx.needs_input_grad
    y, gamma, keep, weight, bias, x_new, mean, rstd = ctx.saved_tensors
    if grad_x_new is None and grad_normed is None:
        return (None,) * 8
    want_weight, want_bias = (want and grad_normed is not None for want in (want_weight, want_bias))
    same = want_x and gamma is None and keep is None and ctx.y_dtype == x_new.dtype
    grads = [
        empty_as(x_new) if want_x else None,
        empty_as(x_new, dtype=ctx.y_dtype) if want_y and not same else None,
        _empty_sum(gamma, x_new) if want_gamma else None,
        _empty_sum(weight, x_new) if want_weight else None,
        _empty_sum(bias, x_new) if want_bias else None,
    ]
    if x_new.numel():
        torch.ops.fused_beit.residual_bwd(grad_x_new, grad_normed, x_new, y, gamma, keep, weight, mean, rstd, *grads)
    if same and want_y:
        grads[1] = grads[0]
    sources = (grad_x_new, grad_normed, x_new, y, gamma, weight)
    grad_x, grad_y, grad_gamma, grad_weight, grad_bias = differentiable_once("residual_norm", grads, *sources)
    return grad_x, grad_y, grad_gamma, None, grad_weight, grad_bias, None, None


def _add_grads(ctx: Any, grad_x_new: Tensor | None) -> tuple[Tensor | None, ...]:
    want_x, want_y, want_gamma, *_ = ctx.needs_input_grad
    y, gamma, keep, *_ = ctx.saved_tensors
    if grad_x_new is None:
        return (None,) * 4
    grad_x = grad_x_new if want_x else None
    if gamma is None and keep is None:
        return grad_x, grad_x_new.to(ctx.y_dtype) if want_y else None, None, None
    grads = [
        empty_as(grad_x_new, dtype=ctx.y_dtype) if want_y else None,
        _empty_sum(gamma, grad_x_new) if want_gamma else None,
    ]
    if grad_x_new.numel() and (want_y or want_gamma):
        torch.ops.fused_beit.residual_bwd(
            grad_x_new, None, grad_x_new, y, gamma, keep, None, None, None, None, *grads, None, None
        )
    grad_y, grad_gamma = differentiable_once("residual_add", grads, grad_x_new, y, gamma)
    return grad_x, grad_y, grad_gamma, None


def _empty_sum(parameter: Tensor, x_new: Tensor) -> Tensor:
    """For a gradient that is a sum over rows: zeros where there are none."""
    return empty_as(parameter) if x_new.numel() else parameter.new_zeros(parameter.shape)


if not hasattr(torch.ops.fused_beit, "residual_norm_fwd"):  # once only, as in impl.py
    torch.library.define("fused_beit::residual_norm_fwd", NORM_FORWARD)
    torch.library.impl("fused_beit::residual_norm_fwd", ("cpu", "cuda"), _norm_forward)
    torch.library.register_fake("fused_beit::residual_norm_fwd", _empty_norm)
    torch.library.define("fused_beit::residual_add_fwd", ADD_FORWARD)
    torch.library.impl("fused_beit::residual_add_fwd", ("cpu", "cuda"), _add_forward)
    torch.library.register_fake("fused_beit::residual_add_fwd", _empty_add)
    torch.library.define("fused_beit::residual_bwd", BACKWARD)
    torch.library.impl("fused_beit::residual_bwd", ("cpu", "cuda"), _backward)
    torch.library.register_fake("fused_beit::residual_bwd", lambda *_: None)
    register_gradient("residual_norm_fwd", _norm_grads, _save_norm)
    register_gradient("residual_add_fwd", _add_grads, _save_add)
