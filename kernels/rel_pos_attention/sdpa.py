"""Attention with a shared additive bias through torch's scaled_dot_product_attention."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..precision import compute_dtype


def rel_pos_attention_sdpa(qkv_BNTHD: Tensor, bias_HNN: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v with the bias as `attn_mask`; exact, the bias gradient included.

    The bias is cast to the dtype of qkv, as torch requires. Torch has a fused kernel with a gradient for `attn_mask`
    only on CUDA (its memory-efficient one): the forward then holds no [B,H,N,N] tensor, but the backward writes the
    gradient of the bias as [B,H,N,N] and sums it over B afterwards. Anywhere else a bias that needs a gradient makes
    torch take its plain path, which holds scores and probabilities as [B,H,N,N] in both directions.
    """
    qkv_BNTHD = qkv_BNTHD.to(compute_dtype(qkv_BNTHD))
    with torch.autocast(qkv_BNTHD.device.type, enabled=False):
        q_BHND, k_BHND, v_BHND = qkv_BNTHD.permute(2, 0, 3, 1, 4).unbind(0)
        mask_1HNN = None if bias_HNN is None else bias_HNN.to(qkv_BNTHD.dtype)[None]
        out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=mask_1HNN, scale=scale)
        return out_BHND.transpose(1, 2).flatten(2)
