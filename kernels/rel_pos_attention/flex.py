"""Attention with a shared additive bias through torch's FlexAttention."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ..impl import Impl, ImplUnavailable, refusal


def why_no_flex(device: torch.device) -> str | None:
    """Why FlexAttention cannot be used for tensors on this device; None where it can."""
    if device.type not in ("cuda", "cpu"):
        return f"FlexAttention has no kernel for {device.type}"
    return None


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attention_flex(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias_HNN: Tensor | None,
    mask_WNN: Tensor | None,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """softmax(scale * q k^T + bias + mask) v with bias and mask read inside the kernel; exact.

    Refused where it cannot keep what was asked for: on CUDA the gradient of a bias is summed by atomics, in no fixed
    order, and needs deterministic=False; on a CPU torch has no gradient of it at all.
    """
    on_cpu = q_BHND.device.type == "cpu"
    why = None
    if torch.is_grad_enabled():
        bias_needs_grad = bias_HNN is not None and bias_HNN.requires_grad
        if on_cpu and (bias_needs_grad or any(tensor.requires_grad for tensor in (q_BHND, k_BHND, v_BHND))):
            why = "FlexAttention has no backward on a CPU"
        elif bias_needs_grad and deterministic:
            why = (
                "FlexAttention sums the gradient of the bias by atomics, in no fixed order; pass deterministic=False "
                "if that will do"
            )
    if why is not None:
        raise ImplUnavailable(refusal("attention", Impl.FLEX, why))
    if not q_BHND.numel():
        return torch.empty_like(q_BHND)  # torch indexes the mask of a picture that is not there
    bias = None if bias_HNN is None else bias_HNN.to(q_BHND.dtype)
    num_masks = 1 if mask_WNN is None else mask_WNN.shape[0]
    mask = None if mask_WNN is None else mask_WNN.expand(-1, q_BHND.shape[2], -1)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if bias is not None:
            score = score + bias[h, query, key]
        if mask is not None:
            score = score + mask[b % num_masks, query, key]
        return score

    if not on_cpu:
        return _compiled()(q_BHND, k_BHND, v_BHND, score_mod=score_mod, scale=scale)
    from torch.nn.attention.flex_attention import flex_attention

    q_BHND, k_BHND, v_BHND = (
        q_BHND.detach(),
        k_BHND.detach(),
        v_BHND.detach(),
    )  # torch does not ask whether grads are on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it holds the scores, uncompiled: compiling takes longer than it saves
        return flex_attention(q_BHND, k_BHND, v_BHND, score_mod=score_mod, scale=scale)
