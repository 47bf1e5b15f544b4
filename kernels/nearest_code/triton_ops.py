"""The Triton kernels as an operator of torch: schema and shapes. Importing this imports no triton.

R rows, K codes, D channels.
"""

import torch
from torch import Tensor

from .._triton.target import why_unavailable
from ..impl import Impl, ImplUnavailable, refusal
from ..precision import accumulate_dtype


def nearest_code_triton(x_RD: Tensor, codes_KD: Tensor, bias_K: Tensor | None) -> tuple[Tensor, Tensor]:
    """argmax_k x . c_k + b_k and its value: [R,D], [K,D] -> int64 [R], fp32 [R]."""
    dtype = torch.promote_types(x_RD.dtype, codes_KD.dtype)
    why = why_unavailable(x_RD.device, dtype)
    if why is not None:
        raise ImplUnavailable(refusal("nearest_code", Impl.TRITON, why))
    with torch.no_grad():
        bias_K = None if bias_K is None else bias_K.to(accumulate_dtype(dtype))
        return torch.ops.fused_beit.nearest_code_fwd(x_RD.to(dtype), codes_KD.to(dtype), bias_K)


def _empty_outputs(x_RD: Tensor, codes_KD: Tensor, bias_K: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = x_RD.shape[:1]
    return x_RD.new_empty(rows, dtype=torch.int64), x_RD.new_empty(rows, dtype=accumulate_dtype(x_RD.dtype))


def _forward(x_RD: Tensor, codes_KD: Tensor, bias_K: Tensor | None) -> tuple[Tensor, Tensor]:
    from .launch import nearest_code

    index_R, score_R = _empty_outputs(x_RD, codes_KD, bias_K)
    if index_R.numel():
        bias_K = None if bias_K is None else bias_K.contiguous()
        nearest_code(_with_rows(x_RD), _with_rows(codes_KD), bias_K, index_R, score_R)
    return index_R, score_R


def _with_rows(tensor: Tensor) -> Tensor:
    """Itself where its last stride is 1, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


if not hasattr(torch.ops.fused_beit, "nearest_code_fwd"):  # once only, as in impl.py
    torch.library.define(
        "fused_beit::nearest_code_fwd", "(Tensor x, Tensor codes, Tensor? bias) -> (Tensor index, Tensor score)"
    )
    torch.library.impl("fused_beit::nearest_code_fwd", ("cpu", "cuda"), _forward)
    torch.library.register_fake("fused_beit::nearest_code_fwd", _empty_outputs)
