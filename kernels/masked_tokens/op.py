"""The public operators of masked pictures.

For BEiT, embed_tokens puts mask tokens into the input of the encoder, and gather_masked takes the masked rows out: of
its output, or as our engine does behind the last attention. For MAE, keep_visible leaves the masked patches out, and
restore_tokens puts mask tokens in before the decoder.
"""

import torch
from torch import Tensor

from .._triton.target import why_unavailable
from ..impl import AUTO, NOT_TIMED, Impl, Operator
from ..tracing import fx_leaf
from ..validation import check_float, check_number, check_positions, check_same_device, check_shape
from .reference import (
    embed_tokens_reference,
    gather_masked_reference,
    keep_visible_reference,
    restore_tokens_reference,
)
from .triton_ops import embed_tokens_triton, gather_masked_triton, keep_visible_triton, restore_tokens_triton

REQUIREMENTS = {Impl.TRITON: why_unavailable}

EMBED = Operator(
    "embed_tokens(Tensor patches, Tensor mask_token, Tensor cls_token, Tensor? pos_embed, Tensor? masked_positions, "
    "str impl) -> Tensor",
    {Impl.REFERENCE: embed_tokens_reference, Impl.TRITON: embed_tokens_triton},
    NOT_TIMED,
    REQUIREMENTS,
)
KEEP = Operator(
    "keep_visible(Tensor patches, Tensor cls_token, Tensor? pos_embed, Tensor visible_positions, str impl) -> Tensor",
    {Impl.REFERENCE: keep_visible_reference, Impl.TRITON: keep_visible_triton},
    NOT_TIMED,
    REQUIREMENTS,
)
RESTORE = Operator(
    "restore_tokens(Tensor x, Tensor mask_token, Tensor? pos_embed, Tensor visible_positions, int num_patches, "
    "str impl) -> Tensor",
    {Impl.REFERENCE: restore_tokens_reference, Impl.TRITON: restore_tokens_triton},
    NOT_TIMED,
    REQUIREMENTS,
)
GATHER = Operator(
    "gather_masked(Tensor x, Tensor masked_positions, Tensor? weight, Tensor? bias, float eps, int num_prefix_tokens, "
    "str impl) -> Tensor",
    {Impl.REFERENCE: gather_masked_reference, Impl.TRITON: gather_masked_triton},
    NOT_TIMED,
    REQUIREMENTS,
)


@fx_leaf
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
    masked_positions: int64 [B, M] masked patches, 0..P-1, each once; -1 is an empty slot; or None: nothing is masked.
                                   `masked_positions_from_bool` makes it of a bool mask.
    ->                [B, P+1, D]  in the widest dtype of patches, tokens and positions, so that fp32 parameters keep
                                   the residual stream in fp32 when autocast made the patches bf16

    One CLS token it is: of registers or a distillation token this knows nothing, and neither of no CLS token.
    Positions outside -1..P-1 or listed twice are refused on a CPU outside of torch.compile; elsewhere nobody looks,
    since that would wait for the device, and the result is undefined.
    Raises ValueError or TypeError for wrong shapes, devices, dtypes or positions, ImplUnavailable for an `impl` it does
    not have.
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
    check_same_device(
        name,
        "patches",
        patches,
        mask_token=mask_token,
        cls_token=cls_token,
        pos_embed=pos_embed,
        masked_positions=masked_positions,
    )
    if masked_positions is not None:
        check_positions(name, "masked_positions", masked_positions, num_patches)
    resolved = EMBED.resolve(impl, patches.device)
    return torch.ops.fused_beit.embed_tokens(
        patches, mask_token, cls_token, pos_embed, masked_positions, resolved.impl.value
    )


@fx_leaf
def keep_visible(
    patches: Tensor,
    cls_token: Tensor,
    pos_embed: Tensor | None,
    visible_positions: Tensor,
    *,
    impl: str | Impl = AUTO,
) -> Tensor:
    """The input of MAE's encoder: CLS and the visible patches alone, each with the position of its place.

    patches:           [B, P, D]    floating point, the patch embeddings
    cls_token:         [D]
    pos_embed:         [P+1, D]     CLS first; or None
    visible_positions: int64 [B, V] visible patches, 0..P-1, each once, in the order wanted; -1 is an empty slot
    ->                 [B, V+1, D]  CLS first; zeros without gradient for an empty slot, which attention still sees; in
                                    the widest dtype of patches, CLS and positions

    Positions are checked as in `embed_tokens`.
    Raises ValueError or TypeError for wrong shapes, devices, dtypes or positions, ImplUnavailable for an `impl` it does
    not have.
    Source: MAE (arXiv:2111.06377) section 3.
    """
    name = "keep_visible"
    check_shape(name, "patches", patches, "B", "P", "D")
    num_pictures, num_patches, width = patches.shape
    check_shape(name, "cls_token", cls_token, width)
    if pos_embed is not None:
        check_shape(name, "pos_embed", pos_embed, num_patches + 1, width)
    check_shape(name, "visible_positions", visible_positions, num_pictures, "V")
    check_float(name, patches=patches, cls_token=cls_token, pos_embed=pos_embed)
    check_same_device(
        name, "patches", patches, cls_token=cls_token, pos_embed=pos_embed, visible_positions=visible_positions
    )
    check_positions(name, "visible_positions", visible_positions, num_patches)
    resolved = KEEP.resolve(impl, patches.device)
    return torch.ops.fused_beit.keep_visible(patches, cls_token, pos_embed, visible_positions, resolved.impl.value)


@fx_leaf
def restore_tokens(
    x: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor | None,
    visible_positions: Tensor,
    num_patches: int,
    *,
    impl: str | Impl = AUTO,
) -> Tensor:
    """The input of MAE's decoder: each visible patch back in its place, mask tokens in the others, positions added.

    x:                 [B, V+1, D]  floating point, CLS first, then the tokens that `keep_visible` kept
    mask_token:        [D]          stands where no slot has the patch
    pos_embed:         [P+1, D]     the decoder's, CLS first; or None
    visible_positions: int64 [B, V] what `keep_visible` was given; the token of an empty slot is dropped, and gets a
                                    gradient of zero
    num_patches:       P
    ->                 [B, P+1, D]  CLS first, in the widest dtype of x, mask token and positions

    Positions are checked as in `embed_tokens`.
    Raises ValueError or TypeError for wrong shapes, devices, dtypes or positions, ImplUnavailable for an `impl` it does
    not have.
    Source: MAE (arXiv:2111.06377) section 3.
    """
    name = "restore_tokens"
    check_number(name, num_patches=num_patches)
    if num_patches < 0:
        raise ValueError(f"{name}: num_patches must be at least 0, but is {num_patches}")
    check_shape(name, "visible_positions", visible_positions, "B", "V")
    num_pictures, num_visible = visible_positions.shape
    check_shape(name, "x", x, num_pictures, num_visible + 1, "D")
    width = x.shape[2]
    check_shape(name, "mask_token", mask_token, width)
    if pos_embed is not None:
        check_shape(name, "pos_embed", pos_embed, num_patches + 1, width)
    check_float(name, x=x, mask_token=mask_token, pos_embed=pos_embed)
    check_same_device(name, "x", x, mask_token=mask_token, pos_embed=pos_embed, visible_positions=visible_positions)
    check_positions(name, "visible_positions", visible_positions, num_patches)
    resolved = RESTORE.resolve(impl, x.device)
    return torch.ops.fused_beit.restore_tokens(
        x, mask_token, pos_embed, visible_positions, num_patches, resolved.impl.value
    )


@fx_leaf
def gather_masked(
    x: Tensor,
    masked_positions: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-6,
    num_prefix_tokens: int = 1,
    impl: str | Impl = AUTO,
) -> Tensor:
    """The rows of the masked patches, through a LayerNorm or as they are.

    x:                 [B, N, D]    floating point
    masked_positions:  int64 [B, M] masked patches, 0..N-num_prefix_tokens-1, each once; -1 is an empty slot
    weight, bias:      [D]          of the LayerNorm, with `eps`; bias None: one without bias; both None: no LayerNorm
    num_prefix_tokens: tokens before the first patch: 1 with a CLS token
    ->                 [B*M, D]     row b*M+m is LayerNorm(x[b, num_prefix_tokens + masked_positions[b, m]]), for an
                                    empty slot zeros without gradient; in the dtype of x, under autocast in autocast's;
                                    without LayerNorm that row of x itself, under autocast too in the dtype of x

    LayerNorm works on single rows, so norming M rows after the gather equals gathering after norming all N.
    Statistics are in fp32 for half-precision inputs. Positions are checked as in `embed_tokens`.
    Raises ValueError or TypeError for wrong shapes, devices, dtypes or positions, ImplUnavailable for an `impl` it does
    not have.
    """
    name = "gather_masked"
    check_shape(name, "x", x, "B", "N", "D")
    num_pictures, num_tokens, width = x.shape
    check_shape(name, "masked_positions", masked_positions, num_pictures, "M")
    if weight is None and bias is not None:
        raise ValueError(f"{name}: bias is added by the LayerNorm, and without weight there is none; give a weight too")
    for parameter, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_shape(name, parameter, tensor, width)
    check_number(name, eps=eps, num_prefix_tokens=num_prefix_tokens)
    check_float(name, x=x, weight=weight, bias=bias)
    check_same_device(name, "x", x, masked_positions=masked_positions, weight=weight, bias=bias)
    if not 0 <= num_prefix_tokens < num_tokens:
        raise ValueError(
            f"{name}: num_prefix_tokens must be at least 0 and less than the {num_tokens} tokens of x, but is "
            f"{num_prefix_tokens}"
        )
    check_positions(name, "masked_positions", masked_positions, num_tokens - num_prefix_tokens)
    resolved = GATHER.resolve(impl, x.device)
    return torch.ops.fused_beit.gather_masked(
        x, masked_positions, weight, bias, eps, num_prefix_tokens, resolved.impl.value
    )
