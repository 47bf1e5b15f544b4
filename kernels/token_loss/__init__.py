"""The loss over visual tokens."""

from .op import TokenLoss, token_loss
from .plan import TokenLossPlan, token_loss_plan

__all__ = ["TokenLoss", "TokenLossPlan", "token_loss", "token_loss_plan"]
