"""The public operators: attention with a bias that all pictures share, and with masks of their own besides."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._triton.target import why_unavailable
from ..impl import A_STEP_IS_NO_FASTER, AUTO, Impl, Operator, Resolved
from ..precision import accumulate_dtype, compute_dtype, without_autocast
from ..tracing import fx_leaf
from ..validation import FLOATING, check_determinism, check_float, check_number, check_same_device, check_shape
from .bias import SharedBias
from .flex import attention_flex, why_no_flex
from .reference import attention_reference
from .sdpa import attention_sdpa
from .triton_ops import attention_triton, rel_pos_attention_triton
from .xformers import attention_xformers, why_no_xformers

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, bool], Tensor]


class _GradientInto(torch.autograd.Function):
    """The bias in the dtype of a tensor that its gradient is added to; autograd gets none.

    Autograd runs the backward of this where the gradient of the bias is wanted, and only there.
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, accumulate_into: Tensor) -> Tensor:
        ctx.accumulate_into = accumulate_into
        return bias.view_as(bias) if bias.dtype == accumulate_into.dtype else bias.to(accumulate_into.dtype)

    @staticmethod
    def backward(ctx: Any, grad_bias: Tensor) -> tuple[None, None]:
        ctx.accumulate_into.add_(grad_bias.detach())
        return None, None


def _accumulating(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run`, with the gradient of its bias where `accumulate_into` says."""

    def accumulate(*arguments: Any) -> Tensor:
        *qkv, bias, rounded_bias, mask, accumulate_into, scale, deterministic = arguments
        if accumulate_into is not None:
            bias = _GradientInto.apply(bias, accumulate_into)
        return run(*qkv, bias, rounded_bias, mask, scale, deterministic)

    return accumulate


def _separate(attend: Attend) -> Callable[..., Tensor]:
    """`attend`, in the dtype that autocast asks for.

    It rounds the bias itself: plain autograd is worth more than the pass that a bias rounded before would save.
    """

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        rounded_bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        deterministic: bool,
    ) -> Tensor:
        dtype = compute_dtype(q)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        mask = None if mask is None else mask.to(dtype)
        with without_autocast(q.device):
            return attend(q, k, v, bias, mask, scale, deterministic)

    return run


def _packed(attend: Attend) -> Callable[..., Tensor]:
    """The same on qkv [B, N, 3, H, D], with the heads side by side in the result."""
    separate = _separate(attend)

    def run(qkv: Tensor, *others: Any) -> Tensor:
        q, k, v = qkv.to(compute_dtype(qkv)).permute(2, 0, 3, 1, 4).unbind(0)
        return separate(q, k, v, *others).transpose(1, 2).flatten(2)

    return run


COMPOSED: dict[Impl, Attend] = {
    Impl.REFERENCE: attention_reference,
    Impl.SDPA: attention_sdpa,
    Impl.XFORMERS: attention_xformers,
    Impl.FLEX: attention_flex,
}
ON_CPU = Resolved(
    Impl.REFERENCE, "measured faster than sdpa on a CPU: fp32 and bf16, forward and backward, N=197 and N=65"
)
ON_CUDA = Resolved(Impl.SDPA, f"takes 0.61 times the time of the reference on an H100; {A_STEP_IS_NO_FASTER}")
AUTOMATIC = {"cpu": ON_CPU, "cuda": ON_CUDA}
REQUIREMENTS = {Impl.TRITON: why_unavailable, Impl.XFORMERS: why_no_xformers, Impl.FLEX: why_no_flex}
OTHERS = (
    "Tensor? bias, Tensor? rounded_bias, Tensor? mask, Tensor? accumulate_into, float scale, bool deterministic, "
    "str impl"
)

PACKED = Operator(
    f"rel_pos_attention(Tensor qkv, {OTHERS}) -> Tensor",
    {impl: _accumulating(_packed(attend)) for impl, attend in COMPOSED.items()}
    | {Impl.TRITON: _accumulating(rel_pos_attention_triton)},
    AUTOMATIC,
    REQUIREMENTS,
)
SEPARATE = Operator(
    f"attention(Tensor q, Tensor k, Tensor v, {OTHERS}) -> Tensor",
    {impl: _accumulating(_separate(attend)) for impl, attend in COMPOSED.items()}
    | {Impl.TRITON: _accumulating(attention_triton)},
    AUTOMATIC,
    REQUIREMENTS,
)


@fx_leaf
def rel_pos_attention(
    qkv: Tensor,
    bias: Tensor | SharedBias | None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    deterministic: bool = True,
    accumulate_into: Tensor | None = None,
    impl: str | Impl = AUTO,
) -> Tensor:
    """Multi-head attention with an additive bias on the scores: softmax(scale * q k^T + bias + mask) v.

    qkv:   [B, N, 3, H, D]  floating point; query, key and value of every token, as the qkv linear makes them
    bias:  [H, N, N]        floating point, any dtype, finite in that of qkv or -inf; added to the scores of every
                            picture (rows: queries). What hides keys from all heads belongs into mask. Or what
                            RelativePositionBias.shared gives, for a bias that many layers share.
    mask:  [N, N], [W, N, N] or [W, 1, N]  added besides, or bool with True for keys that count; picture b uses
                            mask[b % W], so W is 1, the windows of a picture (Swin), or B. Padding [B, N] is
                            mask[:, None]. A mask for each head, [H, N, N], would be taken for H windows where B is a
                            multiple of H: it belongs into bias. It gets no gradient.
    scale: factor on q k^T, a number, 1/sqrt(D) when None. It applies neither to the bias nor to the mask. A learned
           factor is multiplied into q.
    deterministic: sum the gradient of the bias over the pictures in a fixed order, so that it is the same bits in every
                   run; False lets an implementation be faster
    accumulate_into: [H, N, N] fp32 (float64 for float64), contiguous: a backward that wants the gradient of the bias
                     adds it to this, and autograd gets none. A backward for something else leaves it alone, but not
                     under torch.compile, which has one backward for all gradients.
    ->     [B, N, H*D]      in the dtype of qkv; under autocast in autocast's dtype

    A query to which bias and mask leave no key, -inf for each, gives zeros and gradients of zero; `reference` gives NaN
    where a bias alone does so and its gradient is to be made: one that learns is finite. NaN or infinity in a key or
    value spreads although it is masked, since 0 times either is NaN. Half-precision inputs: the bias is used in
    the dtype of qkv, the softmax sums in fp32. `reference` holds the scores in the dtype of qkv, so that one beyond
    65504 gives NaN in fp16; the others do not. There is no dropout. Triton takes heads of a multiple of 8 channels, at
    most 128.
    Raises ValueError or TypeError for wrong shapes, devices or dtypes, ImplUnavailable for an `impl` that is not there
    or cannot run here, RuntimeError for deterministic=False under torch.use_deterministic_algorithms.
    Source: BEiT (arXiv:2106.08254) section 2.2 with the relative position bias of Swin (arXiv:2103.14030) equation 4.
    """
    name = "rel_pos_attention"
    check_shape(name, "qkv", qkv, "B", "N", 3, "H", "D")
    check_float(name, qkv=qkv)
    batch, num_tokens, _, num_heads, head_dim = qkv.shape
    _check_heads(name, "qkv", qkv, num_heads, head_dim)
    bias, rounded_bias = bias if isinstance(bias, SharedBias) else (bias, None)
    check_number(name, "multiply what is learned into q", scale=scale)
    mask = _checked(
        name, "qkv", qkv, batch, num_heads, num_tokens, bias, rounded_bias, mask, accumulate_into, deterministic
    )
    scale = head_dim**-0.5 if scale is None else scale
    resolved = PACKED.resolve(impl, qkv.device)
    return torch.ops.fused_beit.rel_pos_attention(
        qkv, bias, rounded_bias, mask, accumulate_into, scale, deterministic, resolved.impl.value
    )


@fx_leaf
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | SharedBias | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    deterministic: bool = True,
    accumulate_into: Tensor | None = None,
    impl: str | Impl = AUTO,
) -> Tensor:
    """The same for query, key and value apart, as other models have them: softmax(scale * q k^T + bias + mask) v.

    q, k, v: [B, H, N, D]  floating point, of one dtype and shape, of any strides (for triton the last one is 1)
    ->       [B, H, N, D]  in their dtype; with the heads of a token side by side in memory where impl is triton, so
                           that .transpose(1, 2).flatten(2) copies nothing

    All else as for rel_pos_attention.
    """
    name = "attention"
    check_shape(name, "q", q, "B", "H", "N", "D")
    check_shape(name, "k", k, *q.shape)
    check_shape(name, "v", v, *q.shape)
    check_float(name, q=q, k=k, v=v)
    check_same_device(name, "q", q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{name}: q, k and v must have one dtype, but have {q.dtype}, {k.dtype} and {v.dtype}")
    batch, num_heads, num_tokens, head_dim = q.shape
    _check_heads(name, "q", q, num_heads, head_dim)
    bias, rounded_bias = bias if isinstance(bias, SharedBias) else (bias, None)
    check_number(name, "multiply what is learned into q", scale=scale)
    mask = _checked(
        name, "q", q, batch, num_heads, num_tokens, bias, rounded_bias, mask, accumulate_into, deterministic
    )
    scale = head_dim**-0.5 if scale is None else scale
    resolved = SEPARATE.resolve(impl, q.device)
    return torch.ops.fused_beit.attention(
        q, k, v, bias, rounded_bias, mask, accumulate_into, scale, deterministic, resolved.impl.value
    )


def _check_heads(name: str, first_name: str, first: Tensor, num_heads: int, head_dim: int) -> None:
    if not num_heads or not head_dim:
        raise ValueError(
            f"{name}: {first_name} must have at least 1 head of at least 1 channel, but has {num_heads} heads of "
            f"{head_dim} channels, shape {list(first.shape)}"
        )


def _check_accumulate_into(name: str, accumulate_into: Tensor, bias: Tensor | None, wanted: torch.dtype) -> None:
    if bias is None:
        raise ValueError(f"{name}: accumulate_into is for the gradient of bias, which is None; leave it out")
    check_shape(name, "accumulate_into", accumulate_into, *bias.shape)
    if accumulate_into.dtype != wanted:
        raise TypeError(f"{name}: accumulate_into must be {wanted}, but is {accumulate_into.dtype}")
    if not accumulate_into.is_contiguous():
        strides = tuple(accumulate_into.stride())
        raise ValueError(f"{name}: accumulate_into must be contiguous, but has strides {strides}")
    if accumulate_into.requires_grad:
        raise ValueError(f"{name}: accumulate_into must not require a gradient of its own; give a detached tensor")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name}: accumulate_into has no place in torch.func transforms, which return every gradient; leave it out"
        )
    if torch.is_grad_enabled() and not bias.requires_grad:
        raise ValueError(
            f"{name}: accumulate_into is for the gradient of bias, which requires none; leave accumulate_into out, or "
            f"give a bias that requires one"
        )


def _checked(
    name: str,
    first_name: str,
    first: Tensor,
    batch: int,
    num_heads: int,
    num_tokens: int,
    bias: Tensor | None,
    rounded_bias: Tensor | None,
    mask: Tensor | None,
    accumulate_into: Tensor | None,
    deterministic: bool,
) -> Tensor | None:
    """Check what both operators take besides q, k, v. -> the mask as numbers to add, [W, 1 or N, N]."""
    if not (bias is None or isinstance(bias, Tensor)):
        raise TypeError(
            f"{name}: bias must be a tensor [H, N, N], what RelativePositionBias.shared gives, or None, but is a "
            f"{type(bias).__name__}; a RelativePositionBias is called first, `position_bias()`"
        )
    check_float(name, bias=bias)
    others = {"bias": bias, "rounded bias": rounded_bias, "mask": mask, "accumulate_into": accumulate_into}
    check_same_device(name, first_name, first, **others)
    if bias is not None:
        check_shape(name, "bias", bias, num_heads, num_tokens, num_tokens)
    if rounded_bias is not None and rounded_bias.dtype != compute_dtype(first):
        wanted = compute_dtype(first)
        raise TypeError(
            f"{name}: the shared bias was rounded to {rounded_bias.dtype}, but the products are in {wanted}; give "
            f"RelativePositionBias.shared({wanted})"
        )
    if accumulate_into is not None:
        _check_accumulate_into(name, accumulate_into, bias, accumulate_dtype(first.dtype))
    check_number(name, deterministic=deterministic)
    check_determinism(name, deterministic)
    if mask is None:
        return None
    given = list(mask.shape)
    if mask.dim() == 2:
        mask = mask[None]
    fits = mask.dim() == 3 and mask.shape[1] in (1, num_tokens) and mask.shape[2] == num_tokens
    if not fits or not mask.shape[0] or batch % mask.shape[0]:
        raise ValueError(
            f"{name}: mask must have shape [{num_tokens}, {num_tokens}], [W, {num_tokens}, {num_tokens}] or "
            f"[W, 1, {num_tokens}] with W a divisor of {batch}, but has {given}; {_mask_hint(given)}"
        )
    if mask.requires_grad:
        raise ValueError(f"{name}: mask gets no gradient, but requires one; what is learned belongs into bias")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=first.dtype).masked_fill(~mask, float("-inf"))
    if mask.dtype not in FLOATING:
        raise TypeError(f"{name}: mask must be bool (True for keys that count) or floating point, but is {mask.dtype}")
    return mask


def _mask_hint(shape: list[int]) -> str:
    if len(shape) == 4 and shape[1] == 1:
        return "one [B, 1, N, N] of other libraries is mask[:, 0]"
    if len(shape) == 4:
        return "what differs by head belongs into bias, [H, N, N]"
    return "a mask [B, N] of keys is mask[:, None]"
