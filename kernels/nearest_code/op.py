"""The public operator: the index of the best code, without keeping the product."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import target
from ..impl import AUTO, ON_CPU, Impl, Operator, Resolved
from ..tracing import fx_leaf
from ..validation import check_float, check_same_device, check_shape
from .reference import nearest_code_reference
from .triton_ops import nearest_code_triton

ON_CUDA = Resolved(
    Impl.TRITON, "on an H100 1.3 ms, eager torch 17.6 (25,088 rows in bf16, 8,192 codes of 2,048 channels)"
)


def why_not_automatic(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why `auto` is not Triton there; None where it is: in half precision on the architecture that was measured."""
    if device.type != "cuda":
        return None
    if dtype is not None and dtype.itemsize != 2:
        return "triton was measured in half precision alone"
    if why := target.why_not_compiled(device, dtype):
        return why
    if (target.pretended or torch.cuda.is_available()) and (arch := target.arch_of(device)) != "sm_90":
        return f"triton was measured on sm_90 alone, and this is {arch}"
    return None


OPERATOR = Operator(
    "nearest_code(Tensor x, Tensor codes, Tensor? bias, str impl) -> (Tensor, Tensor)",
    {Impl.REFERENCE: nearest_code_reference, Impl.TRITON: nearest_code_triton},
    {"cpu": ON_CPU, "cuda": ON_CUDA},
    {Impl.TRITON: target.why_unavailable},
    why_not_automatic,
)


class NearestCode(NamedTuple):
    """Index (int64) and score (fp32) of the best code of each row."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which has no use here
    score: Tensor


@fx_leaf
def nearest_code(x: Tensor, codes: Tensor, bias: Tensor | None = None, *, impl: str | Impl = AUTO) -> NearestCode:
    """argmax_k x . codes_k + bias_k for each row; the lowest index among equals.

    x:     [R, D]  floating point
    codes: [K, D]  floating point, K at least 1
    bias:  [K]     or None. With bias_k = -|codes_k|^2 / 2 the best code is the nearest in Euclidean distance.
    -> NearestCode(index int64 [R], score fp32 [R]); float64 scores for float64 inputs

    Scores are made in fp32 from half-precision inputs, and autocast does not narrow them: a rounding could turn one
    code into another. Triton sums the products of half precision on tensor cores, whose fp32 keeps fewer digits: on an
    H100 scores were off by 2e-6 of their size, the reference's by 4e-7, so that of two codes as close as that either
    may be found. At most a fixed number of scores is held at a time, with triton none. Without gradient.
    A row with a NaN among its scores gives the index of the first one, and NaN.
    Raises ValueError or TypeError for wrong shapes, devices or dtypes, ImplUnavailable for an `impl` it does not have.
    """
    name = "nearest_code"
    check_shape(name, "x", x, "R", "D")
    check_shape(name, "codes", codes, "K", x.shape[1])
    if codes.shape[0] == 0:
        raise ValueError(f"{name}: codes must have at least 1 row, but has shape {list(codes.shape)}")
    if bias is not None:
        check_shape(name, "bias", bias, codes.shape[0])
    check_float(name, x=x, codes=codes, bias=bias)
    check_same_device(name, "x", x, codes=codes, bias=bias)
    if impl == AUTO and codes.dtype != x.dtype:
        impl = Impl.REFERENCE
    # What `auto` becomes is asked within the operator, for Dynamo cannot trace the question.
    wanted = AUTO if impl == AUTO else OPERATOR.resolve(impl, x.device).impl.value
    index, score = torch.ops.fused_beit.nearest_code(x, codes, bias, wanted)
    return NearestCode(index, score)
