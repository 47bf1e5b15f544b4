"""The loss over visual tokens."""

from .op import TokenLoss, token_loss

__all__ = ["TokenLoss", "token_loss"]
