"""Attention with a shared additive bias through xformers' memory-efficient attention, the one use of xformers."""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..impl import Impl, ImplUnavailable, refusal
from .sdpa import dense_bias

ALIGNMENT = 8
"""Elements: rows of the bias start at multiples of this, as its CUTLASS kernels demand."""


def why_no_xformers(device: torch.device) -> str | None:
    """Why xformers cannot be used for tensors on this device; None where it can."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install xformers)"
    if device.type != "cuda":
        return f"xformers has no operator for {device.type}"
    return None


@functools.cache
def _memory_efficient_attention() -> tuple[Any, tuple[Any, Any]]:
    from xformers.ops import fmha

    return fmha.memory_efficient_attention, (fmha.cutlass.FwOp, fmha.cutlass.BwOp)


def attention_xformers(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias_HNN: Tensor | None,
    mask_WNN: Tensor | None,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """softmax(scale * q k^T + bias + mask) v; exact. Bias and mask are expanded to [B,H,N,N], as is their gradient."""
    why = why_no_xformers(q_BHND.device)
    if why is None and q_BHND.dtype == torch.float64:
        why = "xformers has no operator for torch.float64"
    if why is not None:
        raise ImplUnavailable(refusal("attention", Impl.XFORMERS, why))
    batch, num_heads, num_tokens, _ = q_BHND.shape
    added = dense_bias(bias_HNN, mask_WNN, q_BHND)
    if added is not None:
        # It takes no gradient through a broadcast, and only aligned rows.
        padding = -num_tokens % ALIGNMENT
        added = torch.nn.functional.pad(added.expand(batch, num_heads, -1, -1), (0, padding))[..., :num_tokens]
    attend, op = _memory_efficient_attention()
    q, k, v = q_BHND.transpose(1, 2), k_BHND.transpose(1, 2), v_BHND.transpose(1, 2)
    return attend(q, k, v, attn_bias=added, scale=scale, op=op).transpose(1, 2)
