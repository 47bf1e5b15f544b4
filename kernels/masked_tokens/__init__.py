"""Masked patches: into the encoder as mask tokens or not at all, out of it as rows, into a decoder as mask tokens."""

from .op import embed_tokens, gather_masked, keep_visible, restore_tokens
from .positions import masked_positions_from_bool

__all__ = ["embed_tokens", "gather_masked", "keep_visible", "masked_positions_from_bool", "restore_tokens"]
