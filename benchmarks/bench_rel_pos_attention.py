"""Attention with the relative position bias: ours, what people would use instead, and bounds, in each direction."""

from .attention_providers import OPERATORS  # noqa: F401  the fixtures find it


def test_rel_pos_attention(time_operator):
    time_operator()
