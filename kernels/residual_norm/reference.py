"""LayerScale, DropPath, residual add and the next LayerNorm, in torch: the specification.

B pictures, N tokens, D channels.
"""

import torch
from torch import Tensor

from ..precision import layer_norm


def residual_add_reference(x_BND: Tensor, y_BND: Tensor, gamma_D: Tensor | None, keep_B: Tensor | None) -> Tensor:
    """x + keep * gamma * y in the dtype of x: [B,N,D] -> [B,N,D]."""
    if keep_B is None and gamma_D is None:
        return x_BND + y_BND.to(x_BND.dtype)
    if keep_B is None:
        factor = gamma_D
    elif gamma_D is None:
        factor = keep_B[:, None, None]
    else:
        factor = keep_B[:, None, None] * gamma_D
    assert factor is not None
    return torch.addcmul(x_BND, y_BND.to(x_BND.dtype), factor.to(x_BND.dtype))


def residual_norm_reference(
    x_BND: Tensor,
    y_BND: Tensor,
    gamma_D: Tensor | None,
    keep_B: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(x_new, LayerNorm(x_new)) with x_new = x + keep * gamma * y."""
    x_new_BND = residual_add_reference(x_BND, y_BND, gamma_D, keep_B)
    return x_new_BND, layer_norm(x_new_BND, weight_D, bias_D, eps)
