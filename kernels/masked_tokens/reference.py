"""Masked tokens in torch, the specification: what goes into an encoder or decoder in their place, what is taken out.

B pictures, P patches, N tokens, M slots for masked patches, R = B*M, V slots for visible patches, D channels. Slots of
-1 are padding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

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


def keep_visible_reference(
    patches_BPD: Tensor, cls_token_D: Tensor, pos_embed_ND: Tensor | None, visible_positions_BV: Tensor
) -> Tensor:
    """CLS and the visible patches, positions added, zeros for padding: [B,P,D] -> [B,V+1,D]."""
    width = patches_BPD.shape[2]
    places_BV = visible_positions_BV.clamp_min(0)
    kept_BVD = patches_BPD.gather(1, places_BV[:, :, None].expand(-1, -1, width))
    x_BID = torch.cat([cls_token_D.expand(len(kept_BVD), 1, width), kept_BVD], dim=1)
    if pos_embed_ND is not None:
        tokens_BI = F.pad(places_BV + 1, (1, 0))  # CLS first
        x_BID = x_BID + pos_embed_ND.index_select(0, tokens_BI.flatten()).view(*tokens_BI.shape, width)
    return torch.where(F.pad(visible_positions_BV < 0, (1, 0))[:, :, None], 0, x_BID)


def restore_tokens_reference(
    x_BID: Tensor,
    mask_token_D: Tensor,
    pos_embed_ND: Tensor | None,
    visible_positions_BV: Tensor,
    num_patches: int,
) -> Tensor:
    """Each visible patch in its place, mask tokens in the others, positions added: [B,V+1,D] -> [B,P+1,D]."""
    num_pictures, _, width = x_BID.shape
    x_BID = x_BID.to(torch.promote_types(x_BID.dtype, mask_token_D.dtype))
    # Padding goes to a place past the last patch, then cut off.
    places_BV = torch.where(visible_positions_BV < 0, num_patches, visible_positions_BV)
    hidden_BPD = mask_token_D.to(x_BID.dtype).expand(num_pictures, num_patches + 1, width)
    patches_BPD = hidden_BPD.scatter(1, places_BV[:, :, None].expand(-1, -1, width), x_BID[:, 1:])[:, :num_patches]
    x_BND = torch.cat([x_BID[:, :1], patches_BPD], dim=1)
    return x_BND if pos_embed_ND is None else x_BND + pos_embed_ND


def gather_masked_reference(
    x_BND: Tensor,
    masked_positions_BM: Tensor,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    num_prefix_tokens: int,
) -> Tensor:
    """The rows num_prefix_tokens + position, normed where weights are given; zeros for padding: [B,N,D] -> [B*M,D]."""
    num_pictures, num_tokens, _ = x_BND.shape
    first_row_B1 = torch.arange(num_pictures, device=x_BND.device)[:, None] * num_tokens + num_prefix_tokens
    rows = (first_row_B1 + masked_positions_BM.clamp_min(0)).flatten()
    x_RD = x_BND.flatten(0, 1).index_select(0, rows)
    if weight_D is not None:
        x_RD = layer_norm(x_RD, weight_D, bias_D, eps)
    return torch.where(masked_positions_BM.reshape(-1, 1) < 0, 0, x_RD)
