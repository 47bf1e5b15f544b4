"""The Triton kernels as operators of torch: schemas, shapes, gradients. Importing this imports no triton."""

from typing import Any

import torch
from torch import Tensor

from .._triton.target import why_unavailable
from ..differentiation import differentiable_once, refuse_other_derivatives, register_gradient
from ..impl import Impl, ImplUnavailable, refusal
from ..precision import accumulate_dtype, compute_dtype

PLACE_FORWARD = (
    "(str place, Tensor source, Tensor? cls_token, Tensor? mask_token, Tensor? pos_embed, Tensor? positions, "
    "int num_patches) -> Tensor"
)
PLACE_BACKWARD = (
    "(str place, Tensor grad, Tensor? positions, int num_patches, Tensor(a!)? grad_source, "
    "Tensor(b!)? grad_mask_token, Tensor(c!)? grad_tokens) -> ()"
)
GATHER_FORWARD = (
    "(Tensor x, Tensor positions, Tensor? weight, Tensor? bias, float eps, int num_prefix_tokens, ScalarType dtype) "
    "-> (Tensor out, Tensor mean, Tensor rstd)"
)
GATHER_BACKWARD = (
    "(Tensor grad, Tensor? x, Tensor positions, Tensor? weight, Tensor? mean, Tensor? rstd, int num_prefix_tokens, "
    "Tensor(a!)? grad_x, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()"
)
PUBLIC_NAMES = {"embed": "embed_tokens", "keep": "keep_visible", "restore": "restore_tokens"}


def embed_tokens_triton(
    patches_BPD: Tensor,
    mask_token_D: Tensor,
    cls_token_D: Tensor,
    pos_embed_ND: Tensor | None,
    masked_positions_BM: Tensor | None,
) -> Tensor:
    """CLS in front, masked patches replaced, positions added after that: [B,P,D] -> [B,P+1,D]."""
    mask_token = None if masked_positions_BM is None else mask_token_D  # as in the reference, where it has no part then
    return _place(
        "embed", patches_BPD, cls_token_D, mask_token, pos_embed_ND, masked_positions_BM, patches_BPD.shape[1]
    )


def keep_visible_triton(
    patches_BPD: Tensor, cls_token_D: Tensor, pos_embed_ND: Tensor | None, visible_positions_BV: Tensor
) -> Tensor:
    """CLS and the visible patches with their positions: [B,P,D] -> [B,V+1,D]."""
    return _place("keep", patches_BPD, cls_token_D, None, pos_embed_ND, visible_positions_BV, patches_BPD.shape[1])


def restore_tokens_triton(
    x_BWD: Tensor,
    mask_token_D: Tensor,
    pos_embed_ND: Tensor | None,
    visible_positions_BV: Tensor,
    num_patches: int,
) -> Tensor:
    """Every patch in its place, mask tokens for those that are missing, positions added: [B,V+1,D] -> [B,P+1,D]."""
    return _place("restore", x_BWD, None, mask_token_D, pos_embed_ND, visible_positions_BV, num_patches)


def gather_masked_triton(
    x_BND: Tensor,
    masked_positions_BM: Tensor,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    num_prefix_tokens: int,
) -> Tensor:
    """The rows num_prefix_tokens + position, normed where weights are given; zeros for padding: [B,N,D] -> [B*M,D]."""
    dtype = x_BND.dtype if weight_D is None else compute_dtype(x_BND)
    _check("gather_masked", [dtype], x_BND, weight_D, bias_D)
    return torch.ops.fused_beit.gather_masked_fwd(
        x_BND, masked_positions_BM, weight_D, bias_D, eps, num_prefix_tokens, dtype
    )[0]


def _place(place: str, source: Tensor, *others: Any) -> Tensor:
    cls_token, mask_token, pos_embed, *_ = others
    _check(PUBLIC_NAMES[place], [], source, cls_token, mask_token, pos_embed)
    return torch.ops.fused_beit.place_tokens_fwd(place, source, *others)


def _check(operator: str, dtypes: list[torch.dtype], *inputs: Tensor | None) -> None:
    """Raise ImplUnavailable where no kernel can run on these tensors, RuntimeError for a derivative that none gives."""
    given = [tensor for tensor in inputs if tensor is not None]
    why = why_unavailable(given[0].device, *dtypes, *(tensor.dtype for tensor in given))
    if why is not None:
        raise ImplUnavailable(refusal(operator, Impl.TRITON, why))
    refuse_other_derivatives(operator, *given)


def _empty_place(
    place: str,
    source: Tensor,
    cls_token: Tensor | None,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
    positions: Tensor | None,
    num_patches: int,
) -> Tensor:
    """[B, P+1, D], or [B, M+1, D] to keep, in the widest dtype."""
    dtype = source.dtype
    for tensor in (cls_token, mask_token, pos_embed):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    num_tokens = 1 + (num_patches if place != "keep" or positions is None else positions.shape[1])
    return source.new_empty((source.shape[0], num_tokens, source.shape[2]), dtype=dtype)


def _place_forward(
    place: str,
    source: Tensor,
    cls_token: Tensor | None,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
    positions: Tensor | None,
    num_patches: int,
) -> Tensor:
    from .launch import place_fwd

    out = _empty_place(place, source, cls_token, mask_token, pos_embed, positions, num_patches)
    if out.numel():
        place_fwd(place, source, cls_token, mask_token, pos_embed, positions, num_patches, out)
    return out


def _place_backward(
    place: str,
    grad: Tensor,
    positions: Tensor | None,
    num_patches: int,
    grad_source: Tensor | None,
    grad_mask_token: Tensor | None,
    grad_tokens: Tensor | None,
) -> None:
    """Fill the gradients that are given."""
    from .launch import place_bwd

    place_bwd(place, grad, positions, num_patches, grad_source, grad_mask_token, grad_tokens)


def _save_place(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.place, source, cls_token, mask_token, pos_embed, positions, ctx.num_patches = inputs
    ctx.source_shape, ctx.source_dtype = source.shape, source.dtype
    ctx.cls_dtype, ctx.mask_dtype, ctx.pos_dtype = (
        None if tensor is None else tensor.dtype for tensor in (cls_token, mask_token, pos_embed)
    )
    ctx.save_for_backward(positions)


def _place_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, want_source, want_cls, want_mask, want_pos, *_ = ctx.needs_input_grad
    (positions,) = ctx.saved_tensors
    width = grad.shape[2]
    # To restore, an empty slot is in no place, and keeps the zeros.
    new = torch.Tensor.new_zeros if ctx.place == "restore" else torch.Tensor.new_empty
    grad_source = new(grad, ctx.source_shape, dtype=ctx.source_dtype) if want_source else None
    num_sums = ctx.num_patches + 1 if want_pos else 1
    wide = accumulate_dtype(grad.dtype)
    grad_tokens = grad.new_empty((num_sums, width), dtype=wide) if want_pos or want_cls else None
    grad_mask = grad.new_empty((width,), dtype=ctx.mask_dtype) if want_mask else None
    if grad.numel():
        torch.ops.fused_beit.place_tokens_bwd(
            ctx.place, grad, positions, ctx.num_patches, grad_source, grad_mask, grad_tokens
        )
    else:
        for tensor in (grad_mask, grad_tokens):
            if tensor is not None:
                tensor.zero_()
    # A copy, for an optimiser may change one of two gradients in place.
    grad_cls = grad_tokens[0].to(ctx.cls_dtype, copy=True) if grad_tokens is not None and want_cls else None
    grad_pos = grad_tokens.to(ctx.pos_dtype) if grad_tokens is not None and want_pos else None
    grads = differentiable_once(PUBLIC_NAMES[ctx.place], [grad_source, grad_cls, grad_mask, grad_pos], grad)
    return None, *grads, None, None


def _empty_gather(
    x: Tensor,
    positions: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_prefix_tokens: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B*M, D], mean and rstd [B*M], or [0] where nothing is normed."""
    num_rows = positions.shape[0] * positions.shape[1]
    num_normed = 0 if weight is None else num_rows
    mean, rstd = (x.new_empty((num_normed,), dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    return x.new_empty((num_rows, x.shape[2]), dtype=dtype), mean, rstd


def _gather_forward(
    x: Tensor,
    positions: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_prefix_tokens: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from .launch import gather_fwd

    out, mean, rstd = _empty_gather(x, positions, weight, bias, eps, num_prefix_tokens, dtype)
    if out.numel():
        statistics = (None, None) if weight is None else (mean, rstd)
        gather_fwd(x, positions, weight, bias, eps, num_prefix_tokens, out, *statistics)
    return out, mean, rstd


def _gather_backward(
    grad: Tensor,
    x: Tensor | None,
    positions: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    num_prefix_tokens: int,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Fill the gradients that are given."""
    from .launch import gather_bwd

    gather_bwd(grad, x, positions, weight, mean, rstd, num_prefix_tokens, grad_x, grad_weight, grad_bias)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, positions, weight, bias, _, ctx.num_prefix_tokens, _ = inputs
    _, mean, rstd = output
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    normed = (None,) * 4 if weight is None else (x, weight, mean, rstd)
    ctx.save_for_backward(positions, *normed)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gather_grads(ctx: Any, grad: Tensor | None, grad_mean: None, grad_rstd: None) -> tuple[Tensor | None, ...]:
    want_x, _, want_weight, want_bias, *_ = ctx.needs_input_grad
    if grad is None:
        return (None,) * 7
    positions, x, weight, mean, rstd = ctx.saved_tensors
    shape, width = ctx.x_shape, ctx.x_shape[-1:]
    new = torch.Tensor.new_empty if shape.numel() else torch.Tensor.new_zeros
    grad_x = new(grad, shape, dtype=ctx.x_dtype) if want_x else None
    grad_weight = new(grad, width, dtype=weight.dtype) if want_weight else None
    grad_bias = new(grad, width, dtype=ctx.bias_dtype) if want_bias else None
    grads = grad_x, grad_weight, grad_bias
    if shape.numel():
        torch.ops.fused_beit.gather_masked_bwd(grad, x, positions, weight, mean, rstd, ctx.num_prefix_tokens, *grads)
    grad_x, grad_weight, grad_bias = differentiable_once("gather_masked", grads, grad, x, weight)
    return grad_x, None, grad_weight, grad_bias, None, None, None


if not hasattr(torch.ops.fused_beit, "place_tokens_fwd"):  # once only, as in impl.py
    torch.library.define("fused_beit::place_tokens_fwd", PLACE_FORWARD)
    torch.library.impl("fused_beit::place_tokens_fwd", ("cpu", "cuda"), _place_forward)
    torch.library.register_fake("fused_beit::place_tokens_fwd", _empty_place)
    torch.library.define("fused_beit::place_tokens_bwd", PLACE_BACKWARD)
    torch.library.impl("fused_beit::place_tokens_bwd", ("cpu", "cuda"), _place_backward)
    torch.library.register_fake("fused_beit::place_tokens_bwd", lambda *_: None)
    torch.library.define("fused_beit::gather_masked_fwd", GATHER_FORWARD)
    torch.library.impl("fused_beit::gather_masked_fwd", ("cpu", "cuda"), _gather_forward)
    torch.library.register_fake("fused_beit::gather_masked_fwd", _empty_gather)
    torch.library.define("fused_beit::gather_masked_bwd", GATHER_BACKWARD)
    torch.library.impl("fused_beit::gather_masked_bwd", ("cpu", "cuda"), _gather_backward)
    torch.library.register_fake("fused_beit::gather_masked_bwd", lambda *_: None)
    register_gradient("place_tokens_fwd", _place_grads, _save_place)
    register_gradient("gather_masked_fwd", _gather_grads, _save_gather)
