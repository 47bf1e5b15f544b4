"""transformers' attention: BEiT and Swin with their bias, and the transformers that are written in the same way.

The classes are known by name; transformers is never imported here. Its attention gets the bias as `attention_mask`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..rel_pos_attention import attention, expand_table, relative_position_index
from ..rel_pos_attention.bias import num_relative_positions
from .fused import Fused, bias_and_mask, dense_bias, known_window, table_impl, why_no_table

# Arguments that would change the attention itself; all others pass through it unread.
REFUSED_ARGUMENTS = ("output_attentions", "head_mask", "is_causal")
ITS_OWN = (None, "eager", "sdpa")


class TransformersAttention(Fused):
    """softmax(scaling * q k^T + attention_mask) v"""

    has_heads = True
    may_use = (
        "shape head_dim q_proj k_proj v_proj o_proj view transpose ALL_ATTENTION_FUNCTIONS get_interface config "
        "_attn_implementation eager_attention_forward training attention_dropout scaling reshape contiguous"
    )
    must_use = "head_dim q_proj k_proj v_proj o_proj attention_dropout scaling"

    config: Any
    head_dim: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    @staticmethod
    def head_dim_of(module: Any) -> int:
        return module.head_dim

    @staticmethod
    def dropout_of(module: Any) -> float:
        return module.attention_dropout

    @staticmethod
    def why_not(module: Any) -> str | None:
        implementation = module.config._attn_implementation
        if implementation not in ITS_OWN:
            return f"its attention is {implementation!r}, where 'eager' and 'sdpa' are known"
        if not isinstance(module.scaling, int | float):
            return f"its scaling is a {type(module.scaling).__name__}, where a number is known"
        return "is_causal is set" if module.is_causal else None

    def bias_and_mask(self, attention_mask: Tensor | None, q_BHND: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the scores, as this library's attention takes it."""
        return bias_and_mask(self, attention_mask, q_BHND)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        self.check_served()
        for name in REFUSED_ARGUMENTS:
            if kwargs.get(name) is not None and kwargs[name] is not False:
                self.refuse(f"{name} is not served")
        if self.config.output_attentions:
            self.refuse("output_attentions is not served, and its config asks for it")
        q_BHND, k_BHND, v_BHND = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias_HNN, mask = self.bias_and_mask(attention_mask, q_BHND)
        out_BHND = attention(q_BHND, k_BHND, v_BHND, bias_HNN, mask=mask, scale=self.scaling, impl=self.fusion.impl)
        return self.o_proj(out_BHND.transpose(1, 2).flatten(2)), None


class BeitAttention(TransformersAttention):
    kind = "transformers BEiT attention"
    source = "transformers.models.beit.modeling_beit.BeitAttention"


class VitAttention(TransformersAttention):
    kind = "transformers ViT attention"
    source = "transformers.models.vit.modeling_vit.ViTAttention"


class DeitAttention(TransformersAttention):
    kind = "transformers DeiT attention"
    source = "transformers.models.deit.modeling_deit.DeiTAttention"


class Dinov2Attention(TransformersAttention):
    kind = "transformers DINOv2 attention"
    source = "transformers.models.dinov2.modeling_dinov2.Dinov2Attention"


class Dinov2WithRegistersAttention(TransformersAttention):
    kind = "transformers DINOv2 attention, with registers"
    source = "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersAttention"


class ViTMaeAttention(TransformersAttention):
    kind = "transformers ViTMAE attention"
    source = "transformers.models.vit_mae.modeling_vit_mae.ViTMAEAttention"


class ViTMsnAttention(TransformersAttention):
    kind = "transformers ViTMSN attention"
    source = "transformers.models.vit_msn.modeling_vit_msn.ViTMSNAttention"


class IJepaAttention(TransformersAttention):
    kind = "transformers I-JEPA attention"
    source = "transformers.models.ijepa.modeling_ijepa.IJepaAttention"


class AstAttention(TransformersAttention):
    kind = "transformers AST attention"
    source = "transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer.ASTAttention"


class VivitAttention(TransformersAttention):
    kind = "transformers ViViT attention"
    source = "transformers.models.vivit.modeling_vivit.VivitAttention"


class PixioAttention(TransformersAttention):
    kind = "transformers Pixio attention"
    source = "transformers.models.pixio.modeling_pixio.PixioAttention"


class Tipsv2Attention(TransformersAttention):
    kind = "transformers TIPS v2 attention"
    source = "transformers.models.tipsv2.modeling_tipsv2.Tipsv2VisionAttention"


class RfDetrAttention(TransformersAttention):
    kind = "transformers RF-DETR attention, in its DINOv2"
    source = "transformers.models.rf_detr.modeling_rf_detr.RfDetrDinov2Attention"


class LwDetrAttention(TransformersAttention):
    kind = "transformers LW-DETR attention, in its ViT"
    source = "transformers.models.lw_detr.modeling_lw_detr.LwDetrViTAttention"


class SwinAttention(TransformersAttention):
    """softmax(scaling * q k^T + bias + mask) v in windows; window b of the batch uses mask b mod W."""

    kind = "transformers Swin attention"
    source = "transformers.models.swin.modeling_swin.SwinAttention"
    may_use = f"{TransformersAttention.may_use} relative_position_bias unsqueeze expand"
    must_use = f"{TransformersAttention.must_use} relative_position_bias"

    relative_position_bias: nn.Module

    def bias_and_mask(self, attention_mask: Tensor | None, q_BHND: Tensor) -> tuple[Tensor, Tensor | None]:
        bias_1HNN = self.relative_position_bias()
        if bias_1HNN.dim() != 4 or bias_1HNN.shape[0] != 1:
            self.refuse(f"its bias must be [1, H, N, N], the same for all windows, but is {list(bias_1HNN.shape)}")
        return bias_1HNN[0], None if attention_mask is None else attention_mask.to(bias_1HNN.dtype)


class SwinBias(Fused):
    """The table of a Swin layer, as a dense bias [1, H, N, N]."""

    kind = "transformers Swin bias"
    source = "transformers.models.swin.modeling_swin.SwinRelativePositionBias"
    may_use = "relative_position_bias_table relative_position_index view window_area permute contiguous unsqueeze"
    must_use = "relative_position_bias_table relative_position_index"

    @staticmethod
    def why_not(module: Any) -> str | None:
        return why_no_table(module)

    @staticmethod
    def window_of(module: Any) -> tuple[int, int] | None:
        return known_window(module, cls_token=False)

    def forward(self) -> Tensor:
        return dense_bias(self, cls_token=False)[None]


class BeitBias(Fused):
    """The table of a BEiT, its own in a layer or one for all of them, as a dense bias [1, H, N, N]."""

    kind = "transformers BEiT bias"
    source = "transformers.models.beit.modeling_beit.BeitRelativePositionBias"
    may_use = (
        "window_size relative_position_bias_table num_relative_distance reshape permute nn functional interpolate "
        "torch_int torch cat generate_relative_position_index view contiguous unsqueeze squeeze"
    )
    must_use = "relative_position_bias_table interpolate generate_relative_position_index"

    window_size: tuple[int, int]
    relative_position_bias_table: Tensor

    @staticmethod
    def why_not(module: Any) -> str | None:
        why = why_no_table(module)
        if why is not None:
            return why
        height, width = module.window_size
        if height != width:
            return f"its window is {height} x {width}, and the original permutes the table of one that is not square"
        index_NN = module.generate_relative_position_index((height, width))
        if not torch.equal(index_NN.cpu(), relative_position_index((height, width))):
            return "its index is not that of BEiT"
        return None

    @staticmethod
    def window_of(module: Any) -> tuple[int, int]:
        height, width = module.window_size
        return int(height), int(width)

    def forward(
        self, window_size: tuple[int, int], interpolate_pos_encoding: bool = False, dim_size: int | None = None
    ) -> Tensor:
        window, table_RH = self.fusion.window, self.relative_position_bias_table
        if (
            window is None
            or interpolate_pos_encoding
            or tuple(window_size) != window
            or table_RH.shape[0] != num_relative_positions(window)
        ):
            # For a picture of another size the original resizes the table first.
            return super().forward(window_size, interpolate_pos_encoding, dim_size)
        return expand_table(table_RH, window, impl=table_impl(self.fusion.impl))[None]


TRANSFORMERS: tuple[type[Fused], ...] = (
    BeitAttention,
    BeitBias,
    VitAttention,
    DeitAttention,
    Dinov2Attention,
    Dinov2WithRegistersAttention,
    ViTMaeAttention,
    ViTMsnAttention,
    IJepaAttention,
    AstAttention,
    VivitAttention,
    PixioAttention,
    Tipsv2Attention,
    RfDetrAttention,
    LwDetrAttention,
    SwinAttention,
    SwinBias,
)
