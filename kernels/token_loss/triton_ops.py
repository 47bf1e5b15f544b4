"""The Triton loss as operators of torch: schemas, shapes, gradients. Importing this imports no triton.

The gradients of a mean are made in the forward, while the logits are there, up to a factor that the backward brings.
With a factor for each row, which the sum over rows in the weight's gradient cannot wait for, the backward makes the
logits again. A tensor that is not wanted is an empty one. R rows, V tokens of the vocabulary, D channels.
"""

from typing import Any

import torch
from torch import Tensor

from .._triton.target import why_unavailable
from ..differentiation import differentiable_once, refuse_other_derivatives, register_gradient
from ..impl import Impl, ImplUnavailable, refusal
from ..precision import accumulate_dtype, compute_dtype, without_autocast

INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float label_smoothing, int ignore_index"
GRADS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"
FORWARD = f"({INPUTS}, bool mean, bool[] wants) -> (Tensor loss, Tensor accuracy, Tensor count, {GRADS})"
BACKWARD = f"(Tensor grad_rows, {INPUTS}, bool[] wants) -> ({GRADS})"
SCALE = "(Tensor grad, Tensor factor, Tensor count, ScalarType dtype) -> Tensor"


def token_loss_triton(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of hidden @ weight^T + bias, a chunk of rows at a time."""
    hidden_RD = hidden_RD.to(compute_dtype(hidden_RD))
    why = why_unavailable(hidden_RD.device, hidden_RD.dtype)
    if why is not None:
        raise ImplUnavailable(refusal("token_loss", Impl.TRITON, why))
    refuse_other_derivatives("token_loss", hidden_RD, weight_VD, bias_V)
    learned = (hidden_RD, weight_VD, bias_V)
    wants = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in learned]
    loss, accuracy, *_ = torch.ops.fused_beit.token_loss_fwd(
        *learned, targets_R, label_smoothing, ignore_index, reduction == "mean", wants
    )
    return loss, accuracy


def _empty_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: list[bool], dtypes: list[torch.dtype]
) -> list[Tensor]:
    shapes = [hidden.shape, weight.shape, weight.shape[:1]]
    return [
        hidden.new_empty(shape if want else (0,), dtype=dtype)
        for shape, want, dtype in zip(shapes, wants, dtypes, strict=True)
    ]


def _kept_dtypes(hidden: Tensor) -> list[torch.dtype]:
    """Of the gradients kept from the forward to the backward."""
    wide = accumulate_dtype(hidden.dtype)
    return [hidden.dtype, wide, wide]


def _final_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[torch.dtype]:
    return [hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]


def _empty_outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    wants: list[bool],
) -> tuple[Tensor, ...]:
    shape = () if mean else targets.shape
    loss, accuracy = (hidden.new_empty(shape, dtype=accumulate_dtype(hidden.dtype)) for _ in range(2))
    made = [mean and want for want in wants]
    return loss, accuracy, targets.new_empty(()), *_empty_grads(hidden, weight, bias, made, _kept_dtypes(hidden))


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    wants: list[bool],
) -> tuple[Tensor, ...]:
    loss_R, hits_R = (hidden.new_empty(targets.shape, dtype=accumulate_dtype(hidden.dtype)) for _ in range(2))
    grads = _empty_grads(hidden, weight, bias, [mean and want for want in wants], _kept_dtypes(hidden))
    options = {"loss_R": loss_R, "hits_R": hits_R}
    _run(hidden, weight, bias, targets, label_smoothing, ignore_index, grads, options)
    # The count stays on the device; at least 1, so that no row at all gives 0 and not 0/0.
    count = (targets != ignore_index).sum().clamp_min(1)
    if mean:
        return loss_R.sum() / count, hits_R.sum() / count, count, *grads
    return loss_R, hits_R, count, *grads


def _backward(
    grad_rows: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    ignore_index: int,
    wants: list[bool],
) -> tuple[Tensor, ...]:
    grads = _empty_grads(hidden, weight, bias, wants, _kept_dtypes(hidden))
    _run(hidden, weight, bias, targets, label_smoothing, ignore_index, grads, {"scale_R": grad_rows.contiguous()})
    dtypes = _final_dtypes(hidden, weight, bias)
    return tuple(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def _empty_backward(
    grad_rows: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    *_, wants = others
    return tuple(_empty_grads(hidden, weight, bias, wants, _final_dtypes(hidden, weight, bias)))


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    ignore_index: int,
    grads: list[Tensor],
    options: dict[str, Tensor],
) -> None:
    """Fill what is asked of the rows, and those of the gradients that are not empty."""
    from .launch import Gradients, token_loss_chunks

    for total in grads[1:]:
        total.zero_()
    with torch.no_grad(), without_autocast(hidden.device):
        dtype = hidden.dtype
        token_loss_chunks(
            hidden,
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            targets.contiguous(),
            label_smoothing,
            ignore_index,
            Gradients(*(grad if grad.numel() else None for grad in grads)),
            **options,
        )


def _empty_scaled(grad: Tensor, factor: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _scale(grad: Tensor, factor: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor / count, rounded once."""
    from .launch import launch_scale

    out = _empty_scaled(grad, factor, count, dtype)
    if grad.numel():
        launch_scale(grad, factor, count, out)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *ctx.options, ctx.mean, wants = inputs
    _, accuracy, count, *grads = output
    ctx.made = [ctx.mean and want for want in wants]
    ctx.save_for_backward(count, *grads, hidden, weight, bias, targets)
    ctx.mark_non_differentiable(accuracy, count, *grads)
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    count, *saved, hidden, weight, bias, targets = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:3])
    grads: list[Tensor | None] = [None, None, None]
    if grad_loss is None:
        pass
    elif all(made or not want for made, want in zip(ctx.made, wants, strict=True)):
        dtypes = _final_dtypes(hidden, weight, bias)
        for i in range(3):
            if wants[i]:
                grads[i] = torch.ops.fused_beit.token_loss_scale(saved[i], grad_loss, count, dtypes[i])
    else:
        grad_rows = (grad_loss / count).expand(targets.shape) if ctx.mean else grad_loss
        found = torch.ops.fused_beit.token_loss_bwd(grad_rows, hidden, weight, bias, targets, *ctx.options, wants)
        grads = [grad if want else None for grad, want in zip(found, wants, strict=True)]
    grads = differentiable_once("token_loss", grads, grad_loss, hidden, weight, bias)
    return *grads, None, None, None, None, None


if not hasattr(torch.ops.fused_beit, "token_loss_fwd"):  # once only, as in impl.py
    torch.library.define("fused_beit::token_loss_fwd", FORWARD)
    torch.library.impl("fused_beit::token_loss_fwd", ("cpu", "cuda"), _forward)
    torch.library.register_fake("fused_beit::token_loss_fwd", _empty_outputs)
    torch.library.define("fused_beit::token_loss_bwd", BACKWARD)
    torch.library.impl("fused_beit::token_loss_bwd", ("cpu", "cuda"), _backward)
    torch.library.register_fake("fused_beit::token_loss_bwd", _empty_backward)
    torch.library.define("fused_beit::token_loss_scale", SCALE)
    torch.library.impl("fused_beit::token_loss_scale", ("cpu", "cuda"), _scale)
    torch.library.register_fake("fused_beit::token_loss_scale", _empty_scaled)
    register_gradient("token_loss_fwd", _grads, _save)
