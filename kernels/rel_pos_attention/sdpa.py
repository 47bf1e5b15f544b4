"""Attention with a shared additive bias through torch's scaled_dot_product_attention."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._triton import target
from .._triton.descriptors import padded_length


def attention_sdpa(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias_HNN: Tensor | None,
    mask_WNN: Tensor | None,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """softmax(scale * q k^T + bias + mask) v with bias and mask as `attn_mask`; exact, the bias gradient included.

    The bias is cast to the dtype of q, as torch requires. Torch has a fused kernel with a gradient for `attn_mask`
    only on CUDA (its memory-efficient one): the forward then holds no [B,H,N,N] tensor, but the backward writes the
    gradient of the bias as [B,H,N,N] and sums it over B afterwards. Anywhere else a bias that needs a gradient makes
    torch take its plain path, which holds scores and probabilities as [B,H,N,N] in both directions. With bias and mask
    both, their sum is [B,H,N,N].
    """
    added = dense_bias(bias_HNN, mask_WNN, q_BHND)
    if not q_BHND.numel():  # torch then leaves the bias out of the graph
        return q_BHND + 0 * sum(tensor.sum() for tensor in (k_BHND, v_BHND, added) if tensor is not None)
    if target.pretended:  # torch chooses by the device of the tensors, which is not the one that is counted for
        full = None if added is None else added.expand(q_BHND.shape[0], q_BHND.shape[1], -1, -1)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q_BHND, k_BHND, v_BHND, full, True, scale=scale)[0]
    return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=added, scale=scale)


def rounded_in_aligned_rows(bias_HNN: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias in `dtype`, in rows that torch's fused kernel on CUDA takes without a copy of its own."""
    if bias_HNN.dtype == dtype:
        return bias_HNN
    num_tokens = bias_HNN.shape[-1]
    return F.pad(bias_HNN.to(dtype), (0, padded_length(num_tokens) - num_tokens))[..., :num_tokens]


def dense_bias(bias_HNN: Tensor | None, mask_WNN: Tensor | None, q_BHND: Tensor) -> Tensor | None:
    """Bias and mask in one tensor that broadcasts to [B, H, N, N], in the dtype of q; None where there is neither."""
    bias_1HNN = None if bias_HNN is None else rounded_in_aligned_rows(bias_HNN, q_BHND.dtype)[None]
    if mask_WNN is None:
        return bias_1HNN
    batch, _, num_tokens, _ = q_BHND.shape
    mask_B1NN = mask_WNN.expand(-1, num_tokens, -1).repeat(batch // mask_WNN.shape[0], 1, 1)[:, None]
    return mask_B1NN if bias_1HNN is None else bias_1HNN + mask_B1NN
