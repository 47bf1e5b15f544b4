"""The launches of this operator that the report compiles ahead of time: the pinned bf16 tiles at BEiT's sizes."""

from collections.abc import Iterator
from functools import partial

import torch

from .._triton.ahead_of_time import Case
from .launch import attention_bwd, attention_fwd
from .plan import keeps_exact_lse

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# Tokens and channels of a head: pictures of 224, 384 and 512 pixels in patches of 16; other heads.
SHAPES = ((197, 64), (577, 64), (1025, 64), (197, 32), (197, 96), (197, 128))
IN_ORDER, ATOMICS = "in order", "atomics"
"""How the gradient of the bias is summed over the pictures."""


def cases() -> Iterator[Case]:
    for arch in ARCHS:
        for num_tokens, head_dim in SHAPES:
            for build in (IN_ORDER, ATOMICS):
                launch = partial(launch_all, num_tokens, head_dim, deterministic=build == IN_ORDER)
                yield Case(arch, f"N={num_tokens} D={head_dim}", build, launch)


def launch_all(
    num_tokens: int,
    head_dim: int,
    *,
    deterministic: bool = True,
    has_bias: bool = True,
    has_mask: bool = False,
) -> None:
    """Forward and backward of 8 pictures with 12 heads, on tensors that hold nothing."""
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    q, k, v = empty(8, num_tokens, 3, 12, head_dim).permute(2, 0, 3, 1, 4).unbind()
    out = empty(8, num_tokens, 12, head_dim).transpose(1, 2)
    parts = (2,) if keeps_exact_lse(q.dtype, masked=has_mask) else ()
    lse = empty(8, 12, num_tokens, *parts, dtype=torch.float32)
    bias = empty(12, num_tokens, num_tokens) if has_bias else None
    mask = empty(4, num_tokens, num_tokens) if has_mask else None
    attention_fwd(q, k, v, bias, mask, 0.125, out, lse)
    attention_bwd(
        out,
        q,
        k,
        v,
        bias,
        mask,
        out,
        lse,
        0.125,
        grad_qkv=(q, k, v),
        grad_bias=empty(12, num_tokens, num_tokens, dtype=torch.float32) if has_bias else None,
        deterministic=deterministic,
    )
