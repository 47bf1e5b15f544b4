"""Rows of D channels in registers: how they are cut, loaded, stored and summed.

A row is two pieces, so that few lanes idle where D is no power of two: MAIN channels, the largest power of two that
fits, and TAIL, a power of two that holds the others, or 0. In Triton, for rows int32 `[ROWS]`, of which `inside` says
which there are, a piece is `[ROWS, SIZE]` from channel FIRST on; everything is computed in ACC.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel have the types that Triton finds at its launch.

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .target import INTERPRETER

PROGRAMS = {"sm_80": 216, "sm_90": 264, "sm_100": 296, "gfx942": 608, INTERPRETER: 3}
"""Programs that sum over rows: two for each multiprocessor of the largest GPU of that name (108, 132, 148, 304).

The order of their sums follows from it, so it is not asked of the GPU at hand, which may have fewer of them.
"""
OTHER_PROGRAMS = 264


class Cut(NamedTuple):
    """How a row is cut, and how many rows are taken at a time."""

    main: int
    tail: int
    rows: int


@functools.cache
def cut(width: int, tile: int) -> Cut:
    """The pieces of a row, and the rows of which a tile of so many numbers holds the next power of two of a width."""
    main = 1 << (width.bit_length() - 1)
    rest = width - main
    tail = 1 << (rest - 1).bit_length() if rest else 0
    return Cut(main, tail, max(1, tile // triton.next_power_of_2(width)))


def cdiv(number: int, size: int) -> int:
    """number / size rounded up: triton.cdiv, which takes 2 us, in the host's code."""
    return -(-number // size)


def num_programs(arch: str) -> int:
    """Programs that sum over rows on this architecture."""
    return PROGRAMS.get(arch, OTHER_PROGRAMS)


def rows_a_program(num_rows: int, row: Cut, arch: str) -> int:
    """Rows that each program sums: whole tiles, as even as so many programs can be."""
    return cdiv(cdiv(num_rows, num_programs(arch)), row.rows) * row.rows


def row_arguments(width: int, row: Cut, dtype: torch.dtype, num_warps: int) -> dict[str, Any]:
    """What every kernel over rows of this width is launched with, to compute what is of this dtype."""
    return {
        "D": width,
        "MAIN": row.main,
        "TAIL": row.tail,
        "ROWS": row.rows,
        "ACC": tl.float64 if dtype is torch.float64 else tl.float32,
        "num_warps": num_warps,
        "enable_fp_fusion": True,
    }


@triton.jit
def load_channels(ptr, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """Channels FIRST to FIRST + SIZE of a vector [D], zeros past its end; 1 without a vector."""
    if ptr is None:
        values = tl.full((SIZE,), 1.0, ACC)
    else:
        channels = FIRST + tl.arange(0, SIZE)
        values = tl.load(ptr + channels, mask=channels < D, other=0.0).to(ACC)
    return values


@triton.jit
def tile_ptrs(ptr, rows, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    # Rows in 64 bits, for there may be more than 2^31 numbers.
    return ptr + rows.to(tl.int64)[:, None] * D + (FIRST + tl.arange(0, SIZE))[None, :]


@triton.jit
def inside_tile(inside, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    return inside[:, None] & ((FIRST + tl.arange(0, SIZE)) < D)[None, :]


@triton.jit
def load_rows(ptr, rows, inside, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """Channels FIRST to FIRST + SIZE of these rows of [R, D], zeros outside of it; zeros without a tensor."""
    if ptr is None:
        values = tl.zeros((rows.shape[0], SIZE), ACC)
    else:
        mask = inside_tile(inside, FIRST, SIZE, D)
        values = tl.load(tile_ptrs(ptr, rows, FIRST, SIZE, D), mask=mask, other=0.0).to(ACC)
    return values


@triton.jit
def store_rows(ptr, rows, inside, values, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    mask = inside_tile(inside, FIRST, SIZE, D)
    tl.store(tile_ptrs(ptr, rows, FIRST, SIZE, D), values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def centre(x, mean, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """x - mean, and zeros in the channels past the last."""
    return tl.where(((FIRST + tl.arange(0, SIZE)) < D)[None, :], x - mean[:, None], 0.0)


@triton.jit
def standardise(main, tail, EPS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Rows less their mean times their rstd, in both parts, and mean and rstd; tail means nothing where TAIL is 0."""
    total = tl.sum(main, axis=1)
    if TAIL:
        total += tl.sum(tail, axis=1)
    mean = total / D
    main = centre(main, mean, 0, MAIN, D)
    squares = tl.sum(main * main, axis=1)
    if TAIL:
        tail = centre(tail, mean, MAIN, TAIL, D)
        squares += tl.sum(tail * tail, axis=1)
    rstd = 1.0 / tl.sqrt(squares / D + EPS)
    if TAIL:
        tail *= rstd[:, None]
    else:
        tail = main  # Triton 3.6 returns no None
    return main * rstd[:, None], tail, mean, rstd


@triton.jit
def store_partial(partial_ptr, program, sums, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """The row of a program in [programs, D]: what its rows sum to."""
    if partial_ptr is not None:
        channels = FIRST + tl.arange(0, SIZE)
        ptrs = partial_ptr + program.to(tl.int64) * D + channels
        tl.store(ptrs, tl.sum(sums, axis=0), mask=channels < D)


@triton.jit
def sum_partials(partial_ptr, out_ptr, num_partials, num_columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    """COLS columns of the sum of partials [P, columns], in an order that P decides."""
    if partial_ptr is not None:
        columns = tl.program_id(0) * COLS + tl.arange(0, COLS)
        sums = tl.zeros((ROWS, COLS), partial_ptr.dtype.element_ty)
        for start in range(0, num_partials, ROWS):
            rows = (start + tl.arange(0, ROWS)).to(tl.int64)
            mask = (rows < num_partials)[:, None] & (columns < num_columns)[None, :]
            sums += tl.load(partial_ptr + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)
        tl.store(out_ptr + columns, tl.sum(sums, axis=0).to(out_ptr.dtype.element_ty), mask=columns < num_columns)
