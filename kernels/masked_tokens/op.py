"""The public operators: embed_tokens puts mask, CLS and position in; gather_masked takes the masked rows out."""

import torch
from torch import Tensor

from ..impl import AUTO, Impl, Operator
from ..validation import check_float, check_int64, check_same_device, check_shape
from .reference import embed_tokens_reference, gather_masked_reference

EMBED = Operator(
    "embed_tokens(Tensor patches, Tensor mask_token, Tensor cls_token, Tensor? pos_embed, Tensor? masked_positions, "
    "str impl) -> Tensor",
    {Impl.REFERENCE: embed_tokens_reference},
)
GATHER = Operator(
    "gather_masked(Tensor x, Tensor masked_positions, Tensor weight, Tensor bias, float eps, int num_prefix_tokens, "
    "str impl) -> Tensor",
    {Impl.REFERENCE: gather_masked_reference},
)


def embed_tokens(
    patches: Tensor,
    mask_token: Tensor,
    cls_token: Tensor,
    pos_embed: Tensor | None,
    masked_positions: Tensor | None,
    *,
    impl: str | Impl = AUTO,
) -> Tensor:
    """The input of the encoder: masked patches become the mask token, CLS goes in front, positions are added last.

    patches:          [B, P, D]    floating point, the patch embeddings
    mask_token:       [D]          replaces the embedding of a masked patch; the position is added to it as to any other
    cls_token:        [D]
    pos_embed:        [P+1, D]     CLS first; or None
    masked_positions: int64 [B, M] masked patches, 0..P-1; -1 is an empty slot; or None when nothing is masked
    ->                [B, P+1, D]  in the widest dtype of patches, tokens and positions, so that fp32 parameters keep
                                   the residual stream in fp32 when autocast made the patches bf16

    Positions outside -1..P-1 are a mistake that is not looked for on the device, since that would wait for it.
    Raises ValueError or TypeError for wrong shapes, devices or dtypes, ImplUnavailable for an `impl` it does not have.
    Source: BEiT (arXiv:2106.08254) section 2.4.
    """
    name = "embed_tokens"
    check_shape(name, "patches", patches, "B", "P", "D")
    num_pictures, num_patches, width = patches.shape
    check_shape(name, "mask_token", mask_token, width)
    check_shape(name, "cls_token", cls_token, width)
    if pos_embed is not None:
        check_shape(name, "pos_embed", pos_embed, num_patches + 1, width)
    if masked_positions is not None:
        check_shape(name, "masked_positions", masked_positions, num_pictures, "M")
    check_float(name, patches=patches, mask_token=mask_token, cls_token=cls_token, pos_embed=pos_embed)
    check_int64(name, masked_positions=masked_positions)
    check_same_device(
        name,
        "patches",
        patches,
        mask_token=mask_token,
        cls_token=cls_token,
        pos_embed=pos_embed,
        masked_positions=masked_positions,
    )
    resolved = EMBED.resolve(impl, patches.device.type)
    return torch.ops.fused_beit.embed_tokens(
        patches, mask_token, cls_token, pos_embed, masked_positions, resolved.impl.value
    )


def gather_masked(
    x: Tensor,
    masked_positions: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    num_prefix_tokens: int = 1,
    impl: str | Impl = AUTO,
) -> Tensor:
    """The encoder's output at the masked patches, through the final LayerNorm.

    x:                 [B, N, D]    floating point
    masked_positions:  int64 [B, M] masked patches, 0..N-num_prefix_tokens-1; -1 is an empty slot
    weight, bias:      [D]          of the LayerNorm, with `eps`
    num_prefix_tokens: tokens before the first patch: 1 with a CLS token
    ->                 [B*M, D]     row b*M+m is LayerNorm(x[b, num_prefix_tokens + masked_positions[b, m]]), for an
                                    empty slot zeros without gradient; in the dtype of x, under autocast in autocast's

    LayerNorm works on single rows, so norming M rows after the gather equals gathering after norming all N.
    Statistics are in fp32 for half-precision inputs.
    Raises ValueError or TypeError for wrong shapes, devices or dtypes, ImplUnavailable for an `impl` it does not have.
    """
    name = "gather_masked"
    check_shape(name, "x", x, "B", "N", "D")
    num_pictures, num_tokens, width = x.shape
    check_shape(name, "masked_positions", masked_positions, num_pictures, "M")
    check_shape(name, "weight", weight, width)
    check_shape(name, "bias", bias, width)
    check_float(name, x=x, weight=weight, bias=bias)
    check_int64(name, masked_positions=masked_positions)
    check_same_device(name, "x", x, masked_positions=masked_positions, weight=weight, bias=bias)
    if not 0 <= num_prefix_tokens < num_tokens:
        raise ValueError(f"{name}: num_prefix_tokens must be in 0..{num_tokens - 1}, but is {num_prefix_tokens}")
    resolved = GATHER.resolve(impl, x.device.type)
    return torch.ops.fused_beit.gather_masked(
        x, masked_positions, weight, bias, eps, num_prefix_tokens, resolved.impl.value
    )
