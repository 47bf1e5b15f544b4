"""The Triton kernels as operators of torch: schemas, shapes, gradients. Importing this imports no triton.

Both operators take q, k, v [B, H, N, D] of any strides; or [B, N, 3, H, D] in the place of q alone, whose gradient the
kernels write in place as one tensor of that shape, as the weight gradient of the qkv linear wants it.
"""

from typing import Any

import torch
from torch import Tensor

from .._triton.descriptors import tma_can_read
from .._triton.target import why_unavailable
from ..differentiation import differentiable_once, refuse_other_derivatives, register_gradient
from ..impl import ImplUnavailable
from ..precision import accumulate_dtype, compute_dtype
from ..validation import check_determinism
from .plan import HEAD_DIM_STEP, LARGEST_HEAD_DIM, keeps_exact_lse

FORWARD = (
    "(Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? rounded_bias, Tensor? mask, float scale, "
    "bool deterministic) -> (Tensor out, Tensor lse)"
)
BACKWARD = (
    "(Tensor grad_out, Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? mask, Tensor out, Tensor lse, "
    "float scale, Tensor(a!)? grad_q, Tensor(b!)? grad_k, Tensor(c!)? grad_v, Tensor(d!)? grad_bias, "
    "bool deterministic) -> ()"
)


def rel_pos_attention_triton(
    qkv_BN3HD: Tensor,
    bias_HNN: Tensor | None,
    rounded_bias_HNN: Tensor | None,
    mask_WNN: Tensor | None,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """softmax(scale * q k^T + bias + mask) v, heads side by side: [B,N,3,H,D] -> [B,N,H*D]."""
    qkv_BN3HD = qkv_BN3HD.to(compute_dtype(qkv_BN3HD))
    _check("rel_pos_attention", qkv_BN3HD)
    refuse_other_derivatives("rel_pos_attention", qkv_BN3HD, bias_HNN)
    mask_WNN = None if mask_WNN is None else mask_WNN.to(qkv_BN3HD.dtype)
    out_BNHD, _ = torch.ops.fused_beit.attention_fwd(
        qkv_BN3HD, None, None, bias_HNN, rounded_bias_HNN, mask_WNN, scale, deterministic
    )
    return out_BNHD.flatten(2)


def attention_triton(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias_HNN: Tensor | None,
    rounded_bias_HNN: Tensor | None,
    mask_WNN: Tensor | None,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """softmax(scale * q k^T + bias + mask) v: [B,H,N,D] -> [B,H,N,D], heads side by side in memory."""
    dtype = compute_dtype(q_BHND)
    q_BHND, k_BHND, v_BHND = q_BHND.to(dtype), k_BHND.to(dtype), v_BHND.to(dtype)
    _check("attention", q_BHND, k_BHND, v_BHND)
    refuse_other_derivatives("attention", q_BHND, k_BHND, v_BHND, bias_HNN)
    mask_WNN = None if mask_WNN is None else mask_WNN.to(dtype)
    out_BNHD, _ = torch.ops.fused_beit.attention_fwd(
        q_BHND, k_BHND, v_BHND, bias_HNN, rounded_bias_HNN, mask_WNN, scale, deterministic
    )
    return out_BNHD.transpose(1, 2)


def _check(operator: str, *tensors: Tensor) -> None:
    """Raise ImplUnavailable where no kernel can run on these tensors, ValueError for strides that none takes."""
    first = tensors[0]
    why = why_unavailable(first.device, first.dtype)
    if why is not None:
        raise ImplUnavailable(f"{operator}: impl='triton' was asked for, but {why}")
    head_dim = first.shape[-1]
    if head_dim % HEAD_DIM_STEP or not HEAD_DIM_STEP <= head_dim <= LARGEST_HEAD_DIM:
        raise ImplUnavailable(
            f"{operator}: impl='triton' takes heads of a multiple of {HEAD_DIM_STEP} channels, at most "
            f"{LARGEST_HEAD_DIM}, but they have {head_dim}; use impl='sdpa'"
        )
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{operator}: impl='triton' needs a last stride of 1, but got strides {tuple(tensor.stride())} for "
                f"shape {list(tensor.shape)}; call .contiguous() first"
            )


def _split(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, D] of either form."""
    if k is not None and v is not None:
        return q, k, v
    q, k, v = q.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _empty_like_heads(q_BHND: Tensor) -> Tensor:
    """[B, H, N, D] with the heads of a token side by side in memory."""
    batch, num_heads, num_tokens, head_dim = q_BHND.shape
    return q_BHND.new_empty(batch, num_tokens, num_heads, head_dim).transpose(1, 2)


def _empty_outputs(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    rounded_bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, N, H, D] and lse [B, H, N], or maximum and sum of each row's exponentials, [B, H, N, 2]."""
    if k is None:
        batch, num_tokens, _, num_heads, head_dim = q.shape
    else:
        batch, num_heads, num_tokens, head_dim = q.shape
    parts = (2,) if keeps_exact_lse(q.dtype, masked=mask is not None) else ()
    lse = q.new_empty(batch, num_heads, num_tokens, *parts, dtype=accumulate_dtype(q.dtype))
    return q.new_empty(batch, num_tokens, num_heads, head_dim), lse


def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    rounded_bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    from .launch import attention_fwd

    out_BNHD, lse = _empty_outputs(q, k, v, bias, rounded_bias, mask, scale, deterministic)
    if out_BNHD.numel():
        used = bias if rounded_bias is None else rounded_bias
        attention_fwd(*_split(q, k, v), used, mask, scale, out_BNHD.transpose(1, 2), lse)
    return out_BNHD, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    grad_bias: Tensor | None,
    deterministic: bool,
) -> None:
    """Fill the gradients of q, k and v, of the form of q, k and v or none of them, and that of the bias where given."""
    from .launch import attention_bwd

    if not tma_can_read(grad_out):
        grad_out = grad_out.contiguous()  # a gradient expanded over pictures, of a sum for one
    attention_bwd(
        grad_out.transpose(1, 2),
        *_split(q, k, v),
        bias,
        mask,
        out.transpose(1, 2),
        lse,
        scale,
        grad_qkv=None if grad_q is None else _split(grad_q, grad_k, grad_v),
        grad_bias=grad_bias,
        deterministic=deterministic,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for lse


def _grads(ctx: Any, grad_out: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    q, k, v, bias, rounded_bias, mask, out, lse = ctx.saved_tensors
    want_q, want_k, want_v, want_bias, *_ = ctx.needs_input_grad
    check_determinism("attention", ctx.deterministic)
    grad_q = grad_k = grad_v = grad_bias = None
    if want_q or want_k or want_v:
        if k is None:
            grad_q = q.new_empty(q.shape)
        else:
            grad_q, grad_k, grad_v = (_empty_like_heads(tensor) for tensor in (q, k, v))
    if want_bias:
        grad_bias = bias.new_empty(bias.shape) if out.numel() else bias.new_zeros(bias.shape)
    if out.numel() and (grad_q is not None or want_bias):
        torch.ops.fused_beit.attention_bwd(
            grad_out,
            q,
            k,
            v,
            bias if rounded_bias is None else rounded_bias,
            mask,
            out,
            lse,
            ctx.scale,
            grad_q,
            grad_k,
            grad_v,
            grad_bias,
            ctx.deterministic,
        )
    wanted = [grad_q if want_q else None, grad_k if want_k else None, grad_v if want_v else None, grad_bias]
    grads = differentiable_once("attention", wanted, grad_out, bias, q, k, v)
    return *grads, None, None, None, None


if not hasattr(torch.ops.fused_beit, "attention_fwd"):  # once only, as in impl.py
    torch.library.define("fused_beit::attention_fwd", FORWARD)
    torch.library.impl("fused_beit::attention_fwd", ("cpu", "cuda"), _forward)
    torch.library.register_fake("fused_beit::attention_fwd", _empty_outputs)
    torch.library.define("fused_beit::attention_bwd", BACKWARD)
    torch.library.impl("fused_beit::attention_bwd", ("cpu", "cuda"), _backward)
    torch.library.register_fake("fused_beit::attention_bwd", lambda *_: None)
    register_gradient("attention_fwd", _grads, _save)
