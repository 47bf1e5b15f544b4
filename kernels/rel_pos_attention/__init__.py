"""Attention with a learned relative position bias."""

from .bias import RelativePositionBias, SharedBias, expand_table, relative_position_index, scatter_table
from .interpolation import interpolate_table
from .op import attention, rel_pos_attention
from .plan import Plan, attention_plan

__all__ = [
    "Plan",
    "RelativePositionBias",
    "SharedBias",
    "attention",
    "attention_plan",
    "expand_table",
    "interpolate_table",
    "rel_pos_attention",
    "relative_position_index",
    "scatter_table",
]
