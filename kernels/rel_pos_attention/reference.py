"""Attention with a shared additive bias, written out in torch: the specification.

B pictures, N tokens, H heads, D channels of a head; T = 3 (query, key, value).
"""

import torch
from torch import Tensor

from ..precision import compute_dtype


def rel_pos_attention_reference(qkv_BNTHD: Tensor, bias_HNN: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v, heads side by side: [B,N,3,H,D] -> [B,N,H*D].

    Scores and bias are in the dtype of qkv; the softmax sums in fp32 and is rounded to that dtype.
    """
    qkv_BNTHD = qkv_BNTHD.to(compute_dtype(qkv_BNTHD))
    with torch.autocast(qkv_BNTHD.device.type, enabled=False):
        q_BHND, k_BHND, v_BHND = qkv_BNTHD.permute(2, 0, 3, 1, 4).unbind(0)
        # Scaling q touches N*D numbers where scaling the scores would touch N*N.
        scores_BHNN = (q_BHND * scale) @ k_BHND.transpose(-2, -1)
        if bias_HNN is not None:
            # In place: the product needs no copy of its result for its own gradient.
            scores_BHNN.add_(bias_HNN.to(scores_BHNN.dtype))
        out_BHND = scores_BHNN.softmax(-1) @ v_BHND
        return out_BHND.transpose(1, 2).flatten(2)
