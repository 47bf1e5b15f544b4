"""Which kernels run with which tiles: pinned for each architecture, head size and dtype. Nothing is searched for.

Two families. `tma`, for sm_90 and sm_100 in half precision: descriptors, whose loads cost no registers for addresses
and masks, wgmma or tensor memory. `pointer`, for everything else, with tiles of its own on AMD.

The tiles of `tma` for heads of up to 64 channels are the fastest of those that an H100 ran. All others were chosen from
what Triton 3.9.0 compiles them to (`make kernel-report`) and are not timed on a GPU yet: first no stack, which is
registers kept in memory; then few bytes loaded for the work of a tile, and as many warps on a processor as the
registers allow.
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
    """How attention runs."""

    arch: str
    tma: bool
    forward: Tile
    backward_q: Tile
    backward_kv: Tile

    def __str__(self) -> str:
        tiles = {"forward": self.forward, "backward of q": self.backward_q, "of k and v": self.backward_kv}
        words = [f"{name} {tile.block_m}x{tile.block_n} by {tile.num_warps} warps" for name, tile in tiles.items()]
        return f"{self.arch}, {'tma' if self.tma else 'pointer'} family: {', '.join(words)}"


# Head size at most -> forward, backward of q, backward of k and v.
Tiles = dict[int, tuple[Tile, Tile, Tile]]

# 64: of nine tiles for each kernel the fastest on an H100 80GB HBM3 with torch 2.11 and Triton 3.6.0, in bf16 at 128
# pictures, 12 heads, 197 tokens, 64 channels. Microseconds, means of 12 launches: forward 104, the others 109 to 218;
# backward of q 145, the others 149 to 281; of k and v 244, the others 274 to 556. No other number of tokens was timed,
# no other head size and no other card: for sm_100 the compiler alone was asked.
# 128: two programs of 64 queries fit, where of 128 only one does, with none beside it to work while it waits.
TMA: Tiles = {
    64: (Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3)),
    128: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 1)),
}
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
def attention_plan(arch: str, head_dim: int, dtype: torch.dtype, *, tma: bool = True) -> Plan:
    """The kernels and tiles for heads of `head_dim` channels, the same for any number of tokens.

    arch: "sm_90", "sm_80", "gfx942", ...
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
    return Plan(arch, tma, *table[64 if head_dim <= 64 else 128])


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
