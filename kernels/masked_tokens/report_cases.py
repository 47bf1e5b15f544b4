"""The launches of this operator that the report compiles ahead of time: the pinned tiles at the widths of BEiT."""

from collections.abc import Iterator
from functools import partial

import torch

from .._triton.ahead_of_time import Case
from .launch import gather_bwd, gather_fwd, place_bwd, place_fwd

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
STREAMS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of the residual stream; fp32 as under autocast, beside patches in bf16."""
SHAPES = ((768, "bf16"), (768, "fp32"), (1024, "bf16"), (1408, "bf16"))
NARROW = (("sm_86", 196), ("sm_86", 4096), ("sm_90", 196), ("sm_90", 4096))
"""Rows of 64, of which a tile has the most, with the patches of 224 and of 1,024 pixels, and as many slots."""
BATCH, NUM_PATCHES = 8, 196
NUM_SLOTS = {"embed": 75, "keep": 49, "restore": 49}
"""Of NUM_PATCHES; of more, as large a share."""


def cases() -> Iterator[Case]:
    for arch in ARCHS:
        for width, stream in SHAPES:
            for place in NUM_SLOTS:
                launches = partial(launch_place, place, width, STREAMS[stream])
                yield Case(arch, f"{place} D={width} x={stream}", "in order", launches)
            for normed, what in ((True, "gather"), (False, "rows")):
                launches = partial(launch_gather, width, STREAMS[stream], normed=normed)
                yield Case(arch, f"{what} D={width} x={stream}", "in order", launches)
    for arch, num_patches in NARROW:
        shape = f"D=64 P={num_patches} x=bf16"
        yield Case(arch, f"embed {shape}", "in order", partial(launch_place, "embed", 64, num_patches=num_patches))
        yield Case(arch, f"gather {shape}", "in order", partial(launch_gather, 64, num_patches=num_patches))


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_place(place: str, width: int, stream: torch.dtype = torch.bfloat16, num_patches: int = NUM_PATCHES) -> None:
    """Forward and backward with every gradient that the place has, on tensors that hold nothing."""
    num_slots = NUM_SLOTS[place] * num_patches // NUM_PATCHES
    num_kept = num_slots + 1
    num_inputs = num_kept if place == "restore" else num_patches
    num_outputs = num_kept if place == "keep" else num_patches + 1
    source = _empty(BATCH, num_inputs, width, dtype=torch.bfloat16)
    out = _empty(BATCH, num_outputs, width, dtype=stream)
    cls_token = None if place == "restore" else _empty(width, dtype=torch.float32)
    mask_token = None if place == "keep" else _empty(width, dtype=torch.float32)
    pos_embed = _empty(num_patches + 1, width, dtype=torch.float32)
    positions = _empty(BATCH, num_slots, dtype=torch.int64)
    place_fwd(place, source, cls_token, mask_token, pos_embed, positions, num_patches, out)
    place_bwd(place, out, positions, num_patches, source, mask_token, pos_embed)


def launch_gather(
    width: int, stream: torch.dtype = torch.bfloat16, num_patches: int = NUM_PATCHES, *, normed: bool = True
) -> None:
    """Forward and backward with every gradient, on tensors that hold nothing."""
    num_slots = NUM_SLOTS["embed"] * num_patches // NUM_PATCHES
    x = _empty(BATCH, num_patches + 1, width, dtype=stream)
    positions = _empty(BATCH, num_slots, dtype=torch.int64)
    if not normed:
        rows = _empty(BATCH * num_slots, width, dtype=stream)
        gather_fwd(x, positions, None, None, 1e-6, 1, rows, None, None)
        gather_bwd(rows, None, positions, None, None, None, 1, x, None, None)
        return
    weight, bias = (_empty(width, dtype=torch.float32) for _ in range(2))
    out = _empty(BATCH * num_slots, width, dtype=torch.bfloat16)
    mean, rstd = (_empty(BATCH * num_slots, dtype=torch.float32) for _ in range(2))
    gather_fwd(x, positions, weight, bias, 1e-6, 1, out, mean, rstd)
    gather_bwd(out, x, positions, weight, mean, rstd, 1, x, weight, bias)
