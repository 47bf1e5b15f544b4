"""Allocates what the kernels fill, and launches them with tiles pinned for each architecture. Nothing is searched for.

The tiles were chosen from what Triton 3.9.0 compiles them to (RESOURCES.md): first no stack, which is registers kept in
memory; then the fewest bytes loaded for a product. Only the one for long codes was timed, on an H100 (README.md).
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .._triton.descriptors import source, tma_can_read
from .._triton.launching import on_device, product_precision
from .._triton.target import arch_of
from .kernels import nearest_code_join_kernel, nearest_code_kernel


class Tile(NamedTuple):
    """Rows, codes and channels of a step, warps of a program, stages of its loads."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


TMA = Tile(128, 256, 64, 8, 4)
# Codes of one step: a tile is over as soon as it is multiplied, and two programs on a processor hide its comparisons.
TMA_ONE_STEP = Tile(128, 128, 64, 8, 3)
POINTER = Tile(128, 128, 32, 8, 3)
FP32 = Tile(128, 128, 16, 8, 2)
AMD = Tile(128, 64, 32, 8, 2)

PROGRAMS = 1024
"""Few rows are split over the codes into about so many programs: several for each processor of the largest GPUs, so
that the last round, which leaves some of them idle, is short beside the others. The result does not depend on it."""

JOIN_ROWS = 256


def tile_of(arch: str, dtype: torch.dtype, width: int, tma: bool) -> Tile:
    """The tile for codes of `width` channels; `tma`: whether the tensors are read through descriptors."""
    if dtype.itemsize > 2:
        return FP32
    if arch.startswith("gfx"):
        return AMD
    if not tma:
        return POINTER
    return TMA_ONE_STEP if width <= TMA_ONE_STEP.block_d else TMA


def uses_tma(arch: str, x_RD: Tensor, codes_KD: Tensor) -> bool:
    """sm_90 to sm_110 feed their tensor cores by TMA; later ones, as sm_120, take the tiles of sm_80."""
    feeds = arch.startswith("sm_") and 90 <= int(arch.removeprefix("sm_")) < 120
    return feeds and x_RD.itemsize == 2 and tma_can_read(x_RD, codes_KD)


def nearest_code(x_RD: Tensor, codes_KD: Tensor, bias_K: Tensor | None, index_R: Tensor, score_R: Tensor) -> None:
    """Fill `index_R` (int64) and `score_R`; x and codes of one dtype with last stride 1, bias in that of the score."""
    (num_rows, width), num_codes = x_RD.shape, codes_KD.shape[0]
    arch = arch_of(x_RD.device)
    tma = uses_tma(arch, x_RD, codes_KD)
    tile = tile_of(arch, x_RD.dtype, width, tma)
    block_d = min(tile.block_d, max(16, 1 << (width - 1).bit_length()))
    num_blocks, num_tiles = -(-num_rows // tile.block_m), -(-num_codes // tile.block_n)
    tiles_a_split = -(-num_tiles // min(num_tiles, -(-PROGRAMS // num_blocks)))
    num_splits = -(-num_tiles // tiles_a_split)
    split_index, split_score = index_R, score_R
    if num_splits > 1:
        split_index, split_score = index_R.new_empty(num_splits, num_rows), score_R.new_empty(num_splits, num_rows)
    with on_device(x_RD.device):
        nearest_code_kernel[(num_blocks, num_splits)](
            source(x_RD[None, None], tile.block_m, block_d, tma),
            source(codes_KD[None, None], tile.block_n, block_d, tma),
            bias_K,
            split_index,
            split_score,
            (0, 0, x_RD.stride(0)),
            (0, 0, codes_KD.stride(0)),
            num_rows,
            tiles_a_split,
            K=num_codes,
            D=width,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=block_d,
            HAS_BIAS=bias_K is not None,
            TMA=tma,
            ACC=tl.float64 if x_RD.dtype is torch.float64 else tl.float32,
            PRECISION=product_precision(x_RD.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        if num_splits > 1:
            nearest_code_join_kernel[(-(-num_rows // JOIN_ROWS),)](
                split_index,
                split_score,
                index_R,
                score_R,
                num_rows,
                num_splits,
                BLOCK_R=JOIN_ROWS,
                num_warps=4,
                enable_fp_fusion=True,
            )
