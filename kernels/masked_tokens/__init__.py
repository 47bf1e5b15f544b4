"""Masked patches: into the encoder as mask tokens or not at all, out of it as rows, into a decoder as mask tokens."""

from .op import embed_tokens, gather_masked, keep_visible, restore_tokens

__all__ = ["embed_tokens", "gather_masked", "keep_visible", "restore_tokens"]
