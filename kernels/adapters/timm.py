"""timm's attention: BEiT with its own and its shared bias, the windows of Swin, and plain vision transformers.

The classes are known by name; timm is never imported here.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..rel_pos_attention import attention, rel_pos_attention
from .fused import Fused, bias_and_mask, dense_bias, known_window

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

    num_heads: int
    scale: float
    qkv: nn.Linear
    attn_drop: nn.Dropout
    proj: nn.Linear
    proj_drop: nn.Dropout
    not_called: ClassVar[tuple[str, ...]] = ("attn_drop",)

    @staticmethod
    def head_dim_of(module: Any) -> int:
        return module.qkv.out_features // (3 * module.num_heads)

    @staticmethod
    def dropout_of(module: Any) -> float:
        return module.attn_drop.p

    @staticmethod
    def why_not(module: Any) -> str | None:
        expected = TimmAttention.head_dim_of(module) ** -0.5
        if module.scale != expected:
            # Of its two paths, the one through scaled_dot_product_attention would ignore it.
            return f"its scale is {module.scale}, and that of its head size is {expected}"
        return None

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

    def forward(self, x_BNC: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        self.check_dropout()
        bias_C = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if bias_C is None:
            qkv_BNC = self.qkv(x_BNC)
        elif self.qkv_bias_separate:
            qkv_BNC = self.qkv(x_BNC) + bias_C
        else:
            qkv_BNC = F.linear(x_BNC, self.qkv.weight, bias_C)
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

    def forward(self, x_BNC: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_dropout()
        out_BNC = rel_pos_attention(
            self.split(self.qkv(x_BNC)),
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

    def forward(self, x_BNC: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        self.check_dropout()
        if is_causal:
            self.refuse("is_causal=True is not served")
        gate = getattr(self, "gate", None)
        qkv_BN3HD = self.split(self.qkv(x_BNC))
        q_BHND, k_BHND, v_BHND = qkv_BN3HD.permute(2, 0, 3, 1, 4).unbind(0)
        bias_HNN, mask = bias_and_mask(self, attn_mask, q_BHND)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            out_BNC = rel_pos_attention(qkv_BN3HD, bias_HNN, mask=mask, scale=self.scale, impl=self.fusion.impl)
        else:
            # Under autocast a norm gives fp32, which the products round again.
            q_BHND = self.q_norm(q_BHND).to(v_BHND.dtype)
            k_BHND = self.k_norm(k_BHND).to(v_BHND.dtype)
            out_BHND = attention(q_BHND, k_BHND, v_BHND, bias_HNN, mask=mask, scale=self.scale, impl=self.fusion.impl)
            out_BNC = out_BHND.transpose(1, 2).flatten(2)
        out_BNC = self.norm(out_BNC)
        if gate is not None:
            out_BNC = out_BNC * gate(x_BNC).sigmoid()
        return self.proj_drop(self.proj(out_BNC))


TIMM: tuple[type[Fused], ...] = (TimmBeitAttention, TimmBeitSharedBias, TimmWindowAttention, TimmVitAttention)
