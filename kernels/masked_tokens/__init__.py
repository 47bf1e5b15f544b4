"""Masked patches: into the encoder as mask tokens, out of it as rows."""

from .op import embed_tokens, gather_masked

__all__ = ["embed_tokens", "gather_masked"]
