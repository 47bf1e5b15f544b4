"""Chunk after chunk of rows: a matrix product of torch's, the kernel, and the products of the gradients.

hidden [R, D] and weight [V, D] of one dtype; R rows, V tokens of the vocabulary, D channels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton.descriptors import padded_length
from .._triton.launching import on_device
from .kernels import token_loss_kernel, token_loss_scale_kernel
from .plan import rows_a_chunk

# For every architecture: 32 numbers a thread fit the registers of each. Others were not timed.
LARGEST_BLOCK = 8192
BLOCK_A_WARP = 512
SUMMED_TOGETHER = 128
SCALE_CONFIG = {"BLOCK": 2048, "num_warps": 8, "enable_fp_fusion": True}


class Gradients(NamedTuple):
    """What to fill: hidden's in its dtype, the others zeros of the accumulate dtype to add to; None: not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def token_loss_chunks(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    label_smoothing: float,
    ignore_index: int,
    grads: Gradients,
    *,
    loss_R: Tensor | None = None,
    hits_R: Tensor | None = None,
    scale_R: Tensor | None = None,
) -> None:
    """Fill `loss_R` and `hits_R`, or neither, and the gradients of loss, or of loss @ scale_R, that are wanted."""
    num_rows, vocab_size = hidden_RD.shape[0], weight_VD.shape[0]
    has_grad = any(grad is not None for grad in grads)
    rows = rows_a_chunk(num_rows, vocab_size, hidden_RD.dtype)
    # Rows of whole vectors, as the products and the kernel load them fastest.
    buffer = hidden_RD.new_empty(min(rows, num_rows), padded_length(vocab_size))[:, :vocab_size]
    for start in range(0, num_rows, rows):
        chunk = slice(start, start + rows)
        hidden = hidden_RD[chunk]
        logits = buffer[: len(hidden)]
        if bias_V is None:
            torch.mm(hidden, weight_VD.t(), out=logits)
        else:
            torch.addmm(bias_V, hidden, weight_VD.t(), out=logits)
        launch_loss(
            logits,
            targets_R[chunk],
            None if loss_R is None else loss_R[chunk],
            None if hits_R is None else hits_R[chunk],
            None if scale_R is None else scale_R[chunk],
            label_smoothing,
            ignore_index,
            has_grad,
        )
        if grads.hidden is not None:
            torch.mm(logits, weight_VD, out=grads.hidden[chunk])
        if grads.weight is not None:
            add_product(grads.weight, logits.t(), hidden)
        if grads.bias is not None:
            grads.bias.add_(sum_of_rows(logits, grads.bias.dtype))


def sum_of_rows(x_RV: Tensor, dtype: torch.dtype) -> Tensor:
    """[V]: the sum over the rows in two steps, first of SUMMED_TOGETHER rows each.

    In one step torch splits so long a sum over many programs, and takes room to join them that is larger than x: on an
    H100 132 MiB at 3,200 rows of 8,192 tokens.
    """
    whole = len(x_RV) - len(x_RV) % SUMMED_TOGETHER
    if not whole:
        return x_RV.sum(0, dtype=dtype)
    total = x_RV[:whole].unflatten(0, (-1, SUMMED_TOGETHER)).sum(1, dtype=dtype).sum(0)
    return total if whole == len(x_RV) else total + x_RV[whole:].sum(0, dtype=dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of `total`, which the sum never leaves."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def launch_loss(
    logits_RV: Tensor,
    targets_R: Tensor,
    loss_R: Tensor | None,
    hits_R: Tensor | None,
    scale_R: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    has_grad: bool,
) -> None:
    """Loss and hits of some rows, and their gradient over the logits."""
    num_rows, vocab_size = logits_RV.shape
    block = min(LARGEST_BLOCK, triton.next_power_of_2(vocab_size))
    with on_device(logits_RV.device):
        token_loss_kernel[(num_rows,)](
            logits_RV,
            targets_R,
            loss_R,
            hits_R,
            scale_R,
            logits_RV.stride(0),
            ignore_index,
            LABEL_SMOOTHING=label_smoothing,
            V=vocab_size,
            BLOCK_V=block,
            HAS_LOSS=loss_R is not None,
            HAS_GRAD=has_grad,
            HAS_SCALE=scale_R is not None,
            ACC=tl.float64 if logits_RV.dtype is torch.float64 else tl.float32,
            num_warps=max(1, block // BLOCK_A_WARP),
            num_stages=1,
            enable_fp_fusion=True,
        )


def launch_scale(grad: Tensor, factor: Tensor, count: Tensor, out: Tensor) -> None:
    """out = grad * factor / count; both contiguous, factor and count one number each on the device."""
    with on_device(grad.device):
        programs = (triton.cdiv(grad.numel(), SCALE_CONFIG["BLOCK"]),)
        token_loss_scale_kernel[programs](grad, factor, count, out, grad.numel(), **SCALE_CONFIG)
