"""The operators of BEiT, for use in any model. Needs torch alone to import."""

from .adapters import FuseReport, fuse, unfuse
from .impl import Impl, ImplUnavailable, Resolved, operators, resolve
from .masked_tokens import (
    embed_tokens,
    gather_masked,
    keep_visible,
    masked_positions_from_bool,
    restore_tokens,
)
from .nearest_code import NearestCode, nearest_code
from .rel_pos_attention import (
    Plan,
    RelativePositionBias,
    SharedBias,
    attention,
    attention_plan,
    expand_table,
    interpolate_table,
    rel_pos_attention,
    relative_position_index,
    scatter_table,
)
from .residual_norm import residual_add, residual_norm
from .token_loss import TokenLoss, TokenLossPlan, token_loss, token_loss_plan

__all__ = [
    "FuseReport",
    "Impl",
    "ImplUnavailable",
    "NearestCode",
    "Plan",
    "RelativePositionBias",
    "Resolved",
    "SharedBias",
    "TokenLoss",
    "TokenLossPlan",
    "attention",
    "attention_plan",
    "embed_tokens",
    "expand_table",
    "fuse",
    "gather_masked",
    "interpolate_table",
    "keep_visible",
    "masked_positions_from_bool",
    "nearest_code",
    "operators",
    "rel_pos_attention",
    "relative_position_index",
    "residual_add",
    "residual_norm",
    "resolve",
    "restore_tokens",
    "scatter_table",
    "token_loss",
    "token_loss_plan",
    "unfuse",
]
