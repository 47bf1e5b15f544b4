"""The best code for each row, in torch: the specification.

R rows, K codes, D channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..precision import accumulate_dtype, without_autocast

MAX_SCORES = 1 << 22
"""Scores held at a time: 16 MiB in fp32, whatever the number of rows."""


def nearest_code_reference(x_RD: Tensor, codes_KD: Tensor, bias_K: Tensor | None) -> tuple[Tensor, Tensor]:
    """argmax_k x . c_k + b_k and its value, computed in fp32: [R,D], [K,D] -> int64 [R], fp32 [R]."""
    wide = accumulate_dtype(torch.promote_types(x_RD.dtype, codes_KD.dtype))
    with torch.no_grad(), without_autocast(x_RD.device):
        codes_KD = codes_KD.to(wide)
        bias_K = None if bias_K is None else bias_K.to(wide)
        # torch.max gives the first of equal maxima.
        best = [
            F.linear(rows.to(wide), codes_KD, bias_K).max(dim=-1)
            for rows in x_RD.split(max(1, MAX_SCORES // codes_KD.shape[0]))
        ]
        return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])
