"""Masked tokens in torch: putting the mask token in, and taking the masked rows out. The specification.

B pictures, P patches, N tokens, M slots for masked patches, D channels. Slots of -1 are padding.
"""

import torch
from torch import Tensor

from ..precision import layer_norm


def embed_tokens_reference(
    patches_BPD: Tensor,
    mask_token_D: Tensor,
    cls_token_D: Tensor,
    pos_embed_ND: Tensor | None,
    masked_positions_BM: Tensor | None,
) -> Tensor:
    """CLS in front, masked patches replaced, positions added after that: [B,P,D] -> [B,P+1,D]."""
    num_pictures, num_patches, width = patches_BPD.shape
    if masked_positions_BM is not None:
        # Padding goes to a column past the last patch, then cut off: boolean indexing would wait for the device.
        slots_BM = torch.where(masked_positions_BM < 0, num_patches, masked_positions_BM)
        masked_BP = patches_BPD.new_zeros(num_pictures, num_patches + 1, dtype=torch.bool)
        masked_BP = masked_BP.scatter(1, slots_BM, True)[:, :num_patches]
        patches_BPD = torch.where(masked_BP[:, :, None], mask_token_D, patches_BPD)
    x_BND = torch.cat([cls_token_D.expand(num_pictures, 1, width), patches_BPD], dim=1)
    return x_BND if pos_embed_ND is None else x_BND + pos_embed_ND


def gather_masked_reference(
    x_BND: Tensor, masked_positions_BM: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, num_prefix_tokens: int
) -> Tensor:
    """LayerNorm of the rows num_prefix_tokens + position; zeros for padding: [B,N,D] -> [B*M,D]."""
    num_pictures, num_tokens, width = x_BND.shape
    first_row_B1 = torch.arange(num_pictures, device=x_BND.device)[:, None] * num_tokens + num_prefix_tokens
    rows = (first_row_B1 + masked_positions_BM.clamp_min(0)).flatten()
    normed = layer_norm(x_BND.reshape(-1, width).index_select(0, rows), weight_D, bias_D, eps)
    return torch.where(masked_positions_BM.reshape(-1, 1) < 0, 0, normed)
