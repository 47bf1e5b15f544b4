"""Which kernels run with which tiles: pinned for each architecture, head size and dtype. Nothing is searched for.

Two families. `tma`, for sm_90 and later: descriptors, whose loads cost no registers for addresses and masks, wgmma, and
the fused backward. `pointer`, for everything else: small tiles. README.md tells where the numbers come from.
"""

import contextlib
import functools
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


# (head size at most, bytes of an element at most) -> forward, backward of q, backward of k and v.
POINTER = {
    (64, 2): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (128, 2): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    (64, 8): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (128, 8): (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)),
}
TMA = {
    (64, 2): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    (128, 2): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
}
FUSED = Tile(32, 128, 8, 1)
FUSED_TOKENS = range(64, 225)

_pinned: Plan | None = None


@functools.cache
def attention_plan(arch: str, num_tokens: int, head_dim: int, dtype: torch.dtype, *, tma: bool = True) -> Plan:
    """The kernels and tiles for pictures of `num_tokens` tokens with heads of `head_dim` channels.

    arch: "sm_90", "sm_80", "gfx942", ...
    tma:  False where descriptors cannot be made of the tensors, whose strides are not multiples of 16 bytes
    """
    if _pinned is not None:
        return _pinned
    tma = tma and has_tma(arch) and dtype.itemsize == 2
    table = TMA if tma else POINTER
    tiles = table[64 if head_dim <= 64 else 128, 2 if dtype.itemsize == 2 else 8]
    fused = FUSED if tma and head_dim <= 64 and num_tokens in FUSED_TOKENS else None
    return Plan(arch, tma, *tiles, fused)


def has_tma(arch: str) -> bool:
    """Whether the architecture has a tensor memory accelerator: sm_90 and later."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


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


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile that holds a head: the next power of two, 16 at least, as a product demands."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tail(length: int, block: int) -> int:
    """Size of the last, shorter tile: what `length` leaves over, as a power of two of at least 16; 0 for nothing."""
    rest = length % block
    return max(16, 1 << (rest - 1).bit_length()) if rest else 0
