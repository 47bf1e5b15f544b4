"""The public operators: the end of a transformer branch, with the LayerNorm that starts the next one or without."""

import torch
from torch import Tensor

from .._triton.target import why_unavailable
from ..impl import AUTO, NO_FASTER_YET, Impl, Operator
from ..tracing import fx_leaf
from ..validation import check_float, check_number, check_same_device, check_shape
from .reference import residual_add_reference, residual_norm_reference
from .triton_ops import residual_add_triton, residual_norm_triton

REQUIREMENTS = {Impl.TRITON: why_unavailable}

ADD = Operator(
    "residual_add(Tensor x, Tensor y, Tensor? gamma, Tensor? keep, str impl) -> Tensor",
    {Impl.REFERENCE: residual_add_reference, Impl.TRITON: residual_add_triton},
    NO_FASTER_YET,
    REQUIREMENTS,
)
NORM = Operator(
    "residual_norm(Tensor x, Tensor y, Tensor? gamma, Tensor? keep, Tensor? weight, Tensor? bias, float eps, "
    "str impl) -> (Tensor, Tensor)",
    {Impl.REFERENCE: residual_norm_reference, Impl.TRITON: residual_norm_triton},
    NO_FASTER_YET,
    REQUIREMENTS,
)


def _check_branch(name: str, x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None) -> None:
    check_shape(name, "x", x, "B", "N", "D")
    num_pictures, num_tokens, width = x.shape
    check_shape(name, "y", y, num_pictures, num_tokens, width)
    if gamma is not None:
        check_shape(name, "gamma", gamma, width)
    if keep is not None:
        check_shape(name, "keep", keep, num_pictures)
    check_float(name, x=x, y=y, gamma=gamma, keep=keep)
    check_same_device(name, "x", x, y=y, gamma=gamma, keep=keep)


@fx_leaf
def residual_add(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, *, impl: str | Impl = AUTO) -> Tensor:
    """x + keep * gamma * y: LayerScale, DropPath and the residual add, where no norm follows.

    x:     [B, N, D]  floating point, the residual stream
    y:     [B, N, D]  floating point, the output of the branch; may be of a narrower dtype than x
    gamma: [D]        LayerScale; or None for 1
    keep:  [B]        DropPath's factor for each picture: 0, or 1 / (probability to keep); or None for 1. It is drawn
                      and not learned: triton refuses one that requires a gradient.
    ->     [B, N, D]  in the dtype of x, under autocast too

    Raises ValueError or TypeError for wrong shapes, devices or dtypes, ImplUnavailable for an `impl` it does not have.
    Source: LayerScale, CaiT (arXiv:2103.17239) equation 4; stochastic depth (arXiv:1603.09382) section 3.
    """
    _check_branch("residual_add", x, y, gamma, keep)
    resolved = ADD.resolve(impl, x.device)
    return torch.ops.fused_beit.residual_add(x, y, gamma, keep, resolved.impl.value)


@fx_leaf
def residual_norm(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-6,
    impl: str | Impl = AUTO,
) -> tuple[Tensor, Tensor]:
    """(x_new, LayerNorm(x_new)) with x_new = x + keep * gamma * y.

    x, y, gamma, keep: as in `residual_add`
    weight, bias:      [D]        of the LayerNorm, with `eps`; None for one that has none of its own, as of
                                  nn.LayerNorm(bias=False) or (elementwise_affine=False)
    -> x_new           [B, N, D]  in the dtype of x, under autocast too: the residual stream is never narrowed
       normed          [B, N, D]  in the dtype of x; under autocast in autocast's dtype, as the next linear wants it

    Statistics are in fp32 for half-precision inputs.
    Raises ValueError or TypeError for wrong shapes, devices or dtypes, ImplUnavailable for an `impl` it does not have.
    """
    name = "residual_norm"
    _check_branch(name, x, y, gamma, keep)
    for parameter, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_shape(name, parameter, tensor, x.shape[2])
    check_number(name, eps=eps)
    check_float(name, weight=weight, bias=bias)
    check_same_device(name, "x", x, weight=weight, bias=bias)
    resolved = NORM.resolve(impl, x.device)
    return torch.ops.fused_beit.residual_norm(x, y, gamma, keep, weight, bias, eps, resolved.impl.value)
