"""The launches of this operator that the report compiles ahead of time: the pinned bf16 tiles at BEiT's sizes."""

from collections.abc import Iterator
from functools import partial

import torch

from .._triton.ahead_of_time import Case
from .launch import nearest_code

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Channels of DALL-E's last layer and of BEiT v2's codebook.
WIDTHS = (2048, 32)


def cases() -> Iterator[Case]:
    for arch in ARCHS:
        for width in WIDTHS:
            yield Case(arch, f"K=8192 D={width}", "in order", partial(launch_all, width))


def launch_all(width: int) -> None:
    """196 patches of 32 pictures among 8192 codes, on tensors that hold nothing."""
    empty = partial(torch.empty, device="meta")
    rows = 32 * 196
    x, codes = empty(rows, width, dtype=torch.bfloat16), empty(8192, width, dtype=torch.bfloat16)
    nearest_code(x, codes, empty(8192), empty(rows, dtype=torch.int64), empty(rows))
