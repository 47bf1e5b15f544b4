"""The launches of this operator that the report compiles ahead of time: the pinned tiles at the widths of BEiT."""

from collections.abc import Iterator
from functools import partial

import torch

from .._triton.ahead_of_time import Case
from .launch import residual_bwd, residual_fwd

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
WIDTHS = (768, 1024, 1408)
STREAMS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of x; fp32 as under autocast, beside a branch in bf16."""


def cases() -> Iterator[Case]:
    for arch in ARCHS:
        for width in WIDTHS:
            for stream in STREAMS:
                yield Case(arch, f"D={width} x={stream}", "in order", partial(launch_all, width, STREAMS[stream]))


def launch_all(width: int, stream: torch.dtype = torch.bfloat16) -> None:
    """Forward and backward of 8 pictures of 197 tokens with every gradient, on tensors that hold nothing."""
    empty = partial(torch.empty, device="meta")
    x, y = empty(8, 197, width, dtype=stream), empty(8, 197, width, dtype=torch.bfloat16)
    gamma, weight, bias = (empty(width, dtype=torch.float32) for _ in range(3))
    keep = empty(8, dtype=torch.float32)
    mean, rstd = (empty(8, 197, dtype=torch.float32) for _ in range(2))
    residual_fwd(x, y, gamma, keep, weight, bias, 1e-6, x, y, mean, rstd)
    residual_bwd(x, y, x, y, gamma, keep, weight, mean, rstd, x, y, gamma, weight, bias)
