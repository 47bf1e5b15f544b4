"""The public operator: linear to the vocabulary, cross-entropy and accuracy in one."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._triton.target import why_unavailable
from ..impl import AUTO, NO_FASTER_YET, Impl, Operator
from ..tracing import fx_leaf
from ..validation import check_float, check_int64, check_number, check_same_device, check_shape
from .reference import token_loss_reference
from .triton_ops import token_loss_triton

OPERATOR = Operator(
    "token_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float label_smoothing, int ignore_index, "
    "str reduction, str impl) -> (Tensor, Tensor)",
    {Impl.REFERENCE: token_loss_reference, Impl.TRITON: token_loss_triton},
    NO_FASTER_YET,
    {Impl.TRITON: why_unavailable},
)


class TokenLoss(NamedTuple):
    """Loss in nats and share of rows whose likeliest token is the target; both fp32. Only the loss has a gradient."""

    loss: Tensor
    accuracy: Tensor


@fx_leaf
def token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | Impl = AUTO,
) -> TokenLoss:
    """Cross-entropy of softmax(hidden @ weight^T + bias) against token ids, and the accuracy.

    hidden:  [R, D]     floating point
    weight:  [V, D]     floating point, V at least 1; bias: [V] or None
    targets: int64 [R]  0..V-1, or `ignore_index` for a row that does not count
    label_smoothing: share of the target spread evenly over all V tokens, 0..1
    reduction: "mean"   two scalars, means over the rows that count; 0 and 0, with zero gradients, when none does
               "none"   two vectors [R], 0 in rows that do not count; the accuracy is then 0 or 1
    -> TokenLoss(loss, accuracy), fp32 (float64 for float64)

    The product is made in the dtype of hidden (autocast's under autocast), everything after it in fp32. Among equal
    logits the lowest token is the prediction; a row with a NaN among its logits is no hit. Nothing waits for the
    device.
    Raises ValueError or TypeError for wrong arguments, ImplUnavailable for an `impl` it does not have or that
    cannot run here. Targets outside their range are found by torch, on a CPU as IndexError; triton gives NaN for them.
    Source: BEiT (arXiv:2106.08254) equation 3.
    """
    name = "token_loss"
    check_shape(name, "hidden", hidden, "R", "D")
    num_rows, width = hidden.shape
    check_shape(name, "weight", weight, "V", width)
    if weight.shape[0] == 0:
        raise ValueError(f"{name}: weight must have at least 1 row, but has shape {list(weight.shape)}")
    if bias is not None:
        check_shape(name, "bias", bias, weight.shape[0])
    check_shape(name, "targets", targets, num_rows)
    check_float(name, hidden=hidden, weight=weight, bias=bias)
    check_int64(name, targets=targets)
    check_same_device(name, "hidden", hidden, weight=weight, bias=bias, targets=targets)
    if reduction not in ("mean", "none"):
        raise ValueError(f"{name}: reduction must be 'mean' or 'none', but is {reduction!r}")
    check_number(name, label_smoothing=label_smoothing, ignore_index=ignore_index)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be in 0..1, but is {label_smoothing}")
    resolved = OPERATOR.resolve(impl, hidden.device)
    loss, accuracy = torch.ops.fused_beit.token_loss(
        hidden, weight, bias, targets, label_smoothing, ignore_index, reduction, resolved.impl.value
    )
    return TokenLoss(loss, accuracy)
