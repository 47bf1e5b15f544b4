"""Launches the kernels, with tiles pinned by width and programs by architecture. What is filled is contiguous.

B pictures, N tokens, R = B * N rows, D channels.
"""

from typing import Any

from torch import Tensor

from .._triton.launching import on_device
from .._triton.rows import cdiv, cut, row_arguments, rows_a_program
from .._triton.target import arch_of
from ..precision import accumulate_dtype
from .kernels import residual_bwd_kernel, residual_fwd_kernel, residual_sums_kernel

# Chosen from what Triton 3.9.0 compiles them to (`make kernel-report`); README.md says how, and what an H100 took.
TILE = 2048
"""Most numbers of each tensor that a program holds at a time, counting a width as the next power of two."""
FORWARD_WARPS = 1
BACKWARD_WARPS = 4
STAGES = 3

SUM_CONFIG = {"ROWS": 64, "COLS": 32, "num_warps": 4, "enable_fp_fusion": True}


def _shared_arguments(x: Tensor, num_warps: int) -> dict[str, Any]:
    num_pictures, num_tokens, width = x.shape
    return {
        "num_rows": num_pictures * num_tokens,
        "num_tokens": num_tokens,
        **row_arguments(width, cut(width, TILE), x.dtype, num_warps),
    }


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def residual_fwd(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x_new: Tensor,
    normed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Fill x_new [B, N, D], and where it is given, normed [B, N, D] and mean, rstd [B, N]."""
    inputs = _contiguous(x, y, gamma, keep, weight, bias)
    shared = _shared_arguments(x, FORWARD_WARPS)
    grid = (cdiv(shared["num_rows"], shared["ROWS"]),)
    with on_device(x.device):
        residual_fwd_kernel[grid](*inputs, x_new, normed, mean, rstd, EPS=eps, **shared)


def residual_bwd(
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
    """Fill the gradients that are given. y is given where that of gamma is."""
    inputs = _contiguous(grad_x_new, grad_normed, x_new, y, gamma, keep, weight)
    shared = _shared_arguments(x_new, BACKWARD_WARPS)
    num_rows, width = shared["num_rows"], x_new.shape[2]
    num_rows_each = rows_a_program(num_rows, cut(width, TILE), arch_of(x_new.device))
    num_programs = cdiv(num_rows, num_rows_each)
    wanted = (grad_gamma, grad_weight, grad_bias)
    dtype = accumulate_dtype(x_new.dtype)
    sums = [None if grad is None else x_new.new_empty(num_programs, width, dtype=dtype) for grad in wanted]
    with on_device(x_new.device):
        residual_bwd_kernel[(num_programs,)](
            *inputs,
            mean,
            rstd,
            grad_x,
            grad_y,
            *sums,
            rows_a_program=num_rows_each,
            STAGES=STAGES,
            **shared,
        )
        if any(grad is not None for grad in wanted):
            grid = (cdiv(width, SUM_CONFIG["COLS"]), len(wanted))
            residual_sums_kernel[grid](*sums, *wanted, num_programs, D=width, **SUM_CONFIG)
