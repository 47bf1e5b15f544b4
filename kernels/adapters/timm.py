"""timm's attention: BEiT with its own and its shared bias, the windows of Swin, and plain vision transformers.

The classes are known by name; timm is never imported here. Arguments have the original's names: x is [B, N, C].
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..rel_pos_attention import attention, rel_pos_attention
from .fused import Fused, bias_and_mask, dense_bias, has_hooks, known_window, why_no_table

# What these methods are written with, and what makes them what they are.
USED = (
    "F torch nn functional linear cat shape reshape permute unbind transpose softmax scaled_dot_product_attention "
    "qkv num_heads head_dim scale fused_attn attn_drop p training proj proj_drop"
)
NEEDED = "qkv num_heads scale softmax proj proj_drop scaled_dot_product_attention"
TABLE = "_get_rel_pos_bias relative_position_bias_table relative_position_index"
DENSE = "view window_size window_area permute contiguous unsqueeze"


class TimmAttention(Fused):
    """What the three have in common."""

    has_heads = True
    num_heads: int
    scale: float
    qkv: nn.Linear
    attn_drop: nn.Dropout
    proj: nn.Linear
    proj_drop: nn.Dropout
    not_called: ClassVar[tuple[str, ...]] = ("attn_drop",)

    @staticmethod
    def head_dim_of(module: Any) -> int | None:
        """As the module says it, else as its linears do, as far as they are such: LoRA puts a module around them."""
        if isinstance(getattr(module, "head_dim", None), int):
            return module.head_dim
        channels = getattr(module.qkv, "out_features", None)
        if isinstance(channels, int):
            return channels // (3 * module.num_heads)
        channels = getattr(module.proj, "in_features", None)
        return channels // module.num_heads if isinstance(channels, int) else None

    @staticmethod
    def dropout_of(module: Any) -> float:
        return getattr(module.attn_drop, "p", 0.0)

    @staticmethod
    def why_not(module: Any) -> str | None:
        head_dim = TimmAttention.head_dim_of(module)
        if head_dim is None:
            return "neither a head_dim nor the sizes of its qkv or proj say how many channels a head has"
        if not isinstance(module.scale, float) or module.scale != head_dim**-0.5:
            # Of its two paths, the one through scaled_dot_product_attention would ignore it.
            scale = module.scale if isinstance(module.scale, int | float) else f"a {type(module.scale).__name__}"
            return f"its scale is {scale}, and that of its head size is {head_dim**-0.5}"
        return why_no_table(module)

    def split(self, qkv_BNC: Tensor) -> Tensor:
        """[B, N, 3 * H * D] -> [B, N, 3, H, D]"""
        return qkv_BNC.unflatten(-1, (3, self.num_heads, -1))


class TimmBeitAttention(TimmAttention):
    """softmax(scale * q k^T + its own bias + the shared bias) v"""

    kind = "timm BEiT attention"
    source = "timm.models.beit.Attention"
    methods = ("forward", "_get_rel_pos_bias")
    may_use = f"{USED} {TABLE} {DENSE} q_bias k_bias v_bias qkv_bias_separate weight"
    must_use = f"{NEEDED} {TABLE} q_bias k_bias v_bias"

    q_bias: Tensor | None
    k_bias: Tensor
    v_bias: Tensor
    qkv_bias_separate: bool
    relative_position_bias_table: Tensor | None

    @staticmethod
    def window_of(module: Any) -> tuple[int, int] | None:
        return None if module.relative_position_bias_table is None else known_window(module, cls_token=True)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        self.check_served()
        bias_C = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if bias_C is None:
            qkv_BNC = self.qkv(x)
        elif self.qkv_bias_separate:
            qkv_BNC = self.qkv(x) + bias_C
        else:
            qkv_BNC = F.linear(x, self.qkv.weight, bias_C)
        bias_HNN = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            bias_HNN = dense_bias(self, cls_token=True)
            if shared_rel_pos_bias is not None:
                bias_HNN = bias_HNN + shared_rel_pos_bias
        out_BNC = rel_pos_attention(self.split(qkv_BNC), bias_HNN, scale=self.scale, impl=self.fusion.impl)
        return self.proj_drop(self.proj(out_BNC))


class TimmBeitSharedBias(Fused):
    """The table that all layers of a BEiT share, as a dense bias [H, N, N]."""

    kind = "timm BEiT shared bias"
    source = "timm.models.beit.RelativePositionBias"
    may_use = "relative_position_bias_table relative_position_index view window_area permute contiguous"
    must_use = "relative_position_bias_table relative_position_index"

    @staticmethod
    def why_not(module: Any) -> str | None:
        return why_no_table(module)

    @staticmethod
    def window_of(module: Any) -> tuple[int, int] | None:
        return known_window(module, cls_token=True)

    def forward(self) -> Tensor:
        return dense_bias(self, cls_token=True)


class TimmWindowAttention(TimmAttention):
    """The windows of Swin, shifted ones by their mask: window b of the batch uses mask b mod W."""

    kind = "timm Swin window attention"
    source = "timm.models.swin_transformer.WindowAttention"
    methods = ("forward", "_get_rel_pos_bias")
    may_use = f"{USED} {TABLE} {DENSE} expand"
    must_use = f"{NEEDED} {TABLE}"
    not_called = ("attn_drop", "softmax")

    @staticmethod
    def window_of(module: Any) -> tuple[int, int] | None:
        return known_window(module, cls_token=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_served()
        out_BNC = rel_pos_attention(
            self.split(self.qkv(x)),
            dense_bias(self, cls_token=False),
            mask=mask,
            scale=self.scale,
            impl=self.fusion.impl,
        )
        return self.proj_drop(self.proj(out_BNC))


class TimmVitAttention(TimmAttention):
    """A plain vision transformer's, with the norms of queries, keys and outputs and the gate that some have."""

    kind = "timm ViT attention"
    source = "timm.layers.attention.Attention"
    may_use = f"{USED} q_norm k_norm norm gate sigmoid attn_dim resolve_self_attn_mask maybe_add_mask"
    must_use = f"{NEEDED} q_norm k_norm norm"

    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        self.check_served()
        if is_causal:
            self.refuse("is_causal=True is not served")
        gate = getattr(self, "gate", None)
        qkv_BN3HD = self.split(self.qkv(x))
        q_BHND, k_BHND, v_BHND = qkv_BN3HD.permute(2, 0, 3, 1, 4).unbind(0)
        bias_HNN, mask = bias_and_mask(self, attn_mask, q_BHND)
        if all(type(norm) is nn.Identity and not has_hooks(norm) for norm in (self.q_norm, self.k_norm)):
            out_BNC = rel_pos_attention(qkv_BN3HD, bias_HNN, mask=mask, scale=self.scale, impl=self.fusion.impl)
        else:
            # Under autocast a norm gives fp32, which the products round again.
            q_BHND = self.q_norm(q_BHND).to(v_BHND.dtype)
            k_BHND = self.k_norm(k_BHND).to(v_BHND.dtype)
            out_BHND = attention(q_BHND, k_BHND, v_BHND, bias_HNN, mask=mask, scale=self.scale, impl=self.fusion.impl)
            out_BNC = out_BHND.transpose(1, 2).flatten(2)
        out_BNC = self.norm(out_BNC)
        if gate is not None:
            out_BNC = out_BNC * gate(x).sigmoid()
        return self.proj_drop(self.proj(out_BNC))


TIMM: tuple[type[Fused], ...] = (TimmBeitAttention, TimmBeitSharedBias, TimmWindowAttention, TimmVitAttention)
