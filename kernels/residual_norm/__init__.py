"""LayerScale, DropPath, residual add and the next LayerNorm in one step."""

from .op import residual_add, residual_norm

__all__ = ["residual_add", "residual_norm"]
