"""Attention with a learned relative position bias."""

from .bias import RelativePositionBias, relative_position_index
from .op import rel_pos_attention

__all__ = ["RelativePositionBias", "rel_pos_attention", "relative_position_index"]
