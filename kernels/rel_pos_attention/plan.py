"""Which kernels run with which tiles: pinned for each architecture, head size and dtype. Nothing is searched for.

Two families. `tma`, for sm_90 and sm_100 in half precision: descriptors, whose loads cost no registers for addresses
and masks, wgmma or tensor memory, and on sm_90 the fused backward. `pointer`, for everything else, with tiles of its
own on AMD.

The tiles were chosen from what Triton 3.9.0 compiles them to (`make kernel-report`) and are not timed on a GPU yet:
first no stack, which is registers kept in memory; then few bytes loaded for the work of a tile, and as many warps on a
processor as the registers allow.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Tile of one kernel: queries, keys, warps of its programs, stages of its loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """How attention runs for one shape. `backward_fused`, where there is one, stands for the other two."""

    arch: str
    tma: bool
    forward: Tile
    backward_q: Tile
    backward_kv: Tile
    backward_fused: Tile | None = None

    def __str__(self) -> str:
        tiles = {"forward": self.forward}
        if self.backward_fused:
            tiles["fused backward"] = self.backward_fused
        else:
            tiles |= {"backward of q": self.backward_q, "of k and v": self.backward_kv}
        words = [f"{name} {tile.block_m}x{tile.block_n} by {tile.num_warps} warps" for name, tile in tiles.items()]
        return f"{self.arch}, {'tma' if self.tma else 'pointer'} family: {', '.join(words)}"


# Head size at most -> forward, backward of q, backward of k and v.
Tiles = dict[int, tuple[Tile, Tile, Tile]]

# 128 queries by 8 warps and 64 by 4 keep as many rows at work on a processor (256 in the forward, at 64 channels), and
# pad 197 and 577 alike. But 128 read k and v of a picture's head (50 KB at 197 tokens) twice, and 64 four times.
# At 128 channels only one program of 128 queries fits, with none beside it to work while it waits.
TMA: Tiles = {
    64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 1)),
    128: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 1)),
}
# 8 warps compute grad_q twice, once for each half of 128 keys: 138 wgmma where 4 warps need 110 for their 64 keys. But
# those take 40 bytes of stack, and read q and grad_out of a picture's head (50 KB) four times, not twice.
# On sm_100 it is left out: Triton 3.9.0 fits it into the 512 columns of tensor memory, but 3.6 and 3.7 want 1440.
FUSED = Tile(32, 128, 8, 1)
FUSED_TOKENS = range(64, 225)

POINTER: Tiles = {
    64: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 4, 1)),
    128: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 8, 1)),
}
# fp32, and float64 in the interpreter.
POINTER_FP32: Tiles = {
    64: (Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 32, 4, 1)),
    128: (Tile(32, 32, 8, 1), Tile(32, 32, 16, 1), Tile(32, 32, 8, 1)),
}
# A thread has twice the registers, and a program 64 KiB of shared memory.
AMD: Tiles = {
    64: (Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(32, 64, 4, 1)),
    128: (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
}
AMD_FP32: Tiles = {
    64: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    128: (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}

_pinned: Plan | None = None


HEAD_DIM_STEP = 8
LARGEST_HEAD_DIM = 128


@functools.cache
def attention_plan(
    arch: str, num_tokens: int, head_dim: int, dtype: torch.dtype, *, masked: bool = False, tma: bool = True
) -> Plan:
    """The kernels and tiles for pictures of `num_tokens` tokens with heads of `head_dim` channels.

    arch: "sm_90", "sm_80", "gfx942", ...
    masked: whether there is a mask besides the bias; the fused backward has no registers left for one
    tma: False where descriptors cannot be made of the tensors, whose strides are not multiples of 16 bytes

    Raises ValueError for an architecture or heads that no kernel is made for.
    """
    if not re.fullmatch(r"sm_\d+|gfx\w+|interpreter", arch) or (arch.startswith("sm_") and int(arch[3:]) < 80):
        raise ValueError(f"attention_plan: arch must be sm_80 or later, as sm_90, or AMD's, as gfx942, but is {arch!r}")
    if head_dim % HEAD_DIM_STEP or not HEAD_DIM_STEP <= head_dim <= LARGEST_HEAD_DIM:
        raise ValueError(
            f"attention_plan: head_dim must be a multiple of {HEAD_DIM_STEP}, at most {LARGEST_HEAD_DIM}, "
            f"but is {head_dim}"
        )
    if _pinned is not None:
        return _pinned
    half = dtype.itemsize == 2
    tma = tma and half and feeds_tensor_cores_by_tma(arch)
    if arch.startswith("gfx"):
        table = AMD if half else AMD_FP32
    elif tma:
        table = TMA
    else:
        table = POINTER if half else POINTER_FP32
    tiles = table[64 if head_dim <= 64 else 128]
    fits = head_dim <= 64 and num_tokens in FUSED_TOKENS and not masked
    fused = FUSED if tma and arch == "sm_90" and fits else None
    return Plan(arch, tma, *tiles, fused)


def feeds_tensor_cores_by_tma(arch: str) -> bool:
    """Whether the architecture has TMA and tensor cores that read what it brings: sm_90 to sm_110.

    sm_120 has TMA, but takes the products of sm_80 from registers: with the tiles of this family Triton 3.9.0 keeps up
    to 3 KB a thread in memory there.
    """
    return arch.startswith("sm_") and 90 <= int(arch.removeprefix("sm_")) < 120


@contextlib.contextmanager
def pinned(plan: Plan) -> Iterator[None]:
    """Use `plan` for every shape within the block: for tuning, and to test a family on another machine."""
    global _pinned
    before, _pinned = _pinned, plan
    attention_plan.cache_clear()
    try:
        yield
    finally:
        _pinned = before
        attention_plan.cache_clear()


def keeps_exact_lse(dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether the forward keeps the maximum and the sum of a row for the backward, and not their lse (scores.py)."""
    return masked or dtype.itemsize > 2


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile that holds a head: the next power of two, 16 at least, as a product demands."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tail(length: int, block: int) -> int:
    """Size of the last, shorter tile: what `length` leaves over, as a power of two of at least 16; 0 for nothing."""
    rest = length % block
    return max(16, 1 << (rest - 1).bit_length()) if rest else 0
