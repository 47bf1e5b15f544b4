"""The public operator: attention with a bias that all pictures share."""

import torch
from torch import Tensor

from ..impl import AUTO, Impl, Operator, Resolved
from ..validation import check_float, check_same_device, check_shape
from .reference import rel_pos_attention_reference
from .sdpa import rel_pos_attention_sdpa

OPERATOR = Operator(
    "rel_pos_attention(Tensor qkv, Tensor? bias, float scale, str impl) -> Tensor",
    {Impl.REFERENCE: rel_pos_attention_reference, Impl.SDPA: rel_pos_attention_sdpa},
    auto={
        "cpu": Resolved(
            Impl.REFERENCE, "measured faster than sdpa on a CPU: fp32 and bf16, forward and backward, N=197 and N=65"
        ),
        "cuda": Resolved(Impl.SDPA, "avoids a materialised [B,H,N,N] score tensor; not measured yet"),
    },
)


def rel_pos_attention(
    qkv: Tensor, bias: Tensor | None, *, scale: float | None = None, impl: str | Impl = AUTO
) -> Tensor:
    """Multi-head attention with an additive bias on the scores: softmax(scale * q k^T + bias) v.

    qkv:   [B, N, 3, H, D]  floating point; query, key and value of every token, as the qkv linear makes them
    bias:  [H, N, N]        floating point, any dtype; added to the scores of every picture (rows: queries); or None
    scale: factor on q k^T, 1/sqrt(D) when None. It does not apply to the bias.
    ->     [B, N, H*D]      in the dtype of qkv; under autocast in autocast's dtype

    Half-precision inputs: the bias is used in the dtype of qkv, the softmax sums in fp32. There is no dropout.
    Raises ValueError or TypeError for wrong shapes, devices or dtypes, ImplUnavailable for an `impl` it does not have.
    Source: BEiT (arXiv:2106.08254) section 2.2 with the relative position bias of Swin (arXiv:2103.14030) equation 4.
    """
    check_shape("rel_pos_attention", "qkv", qkv, "B", "N", 3, "H", "D")
    check_float("rel_pos_attention", qkv=qkv, bias=bias)
    if bias is not None:
        check_shape("rel_pos_attention", "bias", bias, qkv.shape[3], qkv.shape[1], qkv.shape[1])
        check_same_device("rel_pos_attention", "qkv", qkv, bias=bias)
    if scale is None:
        scale = qkv.shape[4] ** -0.5
    resolved = OPERATOR.resolve(impl, qkv.device.type)
    return torch.ops.fused_beit.rel_pos_attention(qkv, bias, scale, resolved.impl.value)
