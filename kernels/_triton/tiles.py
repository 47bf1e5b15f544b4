"""Loads and stores of rectangular tiles: the one place where kernels do pointer arithmetic.

A tile is ROWS x COLS of a tensor [I, J, NUM_ROWS, NUM_COLS] whose last stride is 1. `tensor` is a descriptor of it with
that block shape (TMA: the hardware addresses, fills and clips), or a pointer to it with the other three strides.

Where rows are padded in memory (descriptors.align_rows), NUM_COLS is the `padded` length: a mask that ends with a whole
vector lets whole vectors be loaded, and the padding, whatever it holds, comes along.
"""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

from .descriptors import ROW_ELEMENTS

STEP = tl.constexpr(ROW_ELEMENTS)


@triton.constexpr_function
def padded(length):
    """Elements of a row of `length` in memory once it is aligned."""
    return (length + STEP - 1) // STEP * STEP


@triton.jit
def load_tile(
    tensor,
    strides,
    i,
    j,
    row,
    col,
    NUM_ROWS: tl.constexpr,
    NUM_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TMA: tl.constexpr,
    INSIDE: tl.constexpr = False,
):
    """The tile at [i, j, row, col], zeros where it reaches past the tensor. INSIDE: its rows are known not to."""
    if TMA:
        tile = tensor.load([i, j, row, col]).reshape(ROWS, COLS)
    else:
        offs_row = row + tl.arange(0, ROWS)
        offs_col = col + tl.arange(0, COLS)
        ptrs = _tile_ptrs(tensor, strides, i, j, row, col, ROWS, COLS)
        inside_row = offs_row[:, None] < NUM_ROWS
        inside_col = offs_col[None, :] < NUM_COLS
        if INSIDE and NUM_COLS == COLS:
            tile = tl.load(ptrs)
        elif INSIDE:
            tile = tl.load(ptrs, mask=inside_col, other=0.0)
        elif NUM_COLS == COLS:
            tile = tl.load(ptrs, mask=inside_row, other=0.0)
        else:
            tile = tl.load(ptrs, mask=inside_row & inside_col, other=0.0)
    return tile


@triton.jit
def store_tile(
    tensor,
    strides,
    i,
    j,
    row,
    col,
    tile,
    NUM_ROWS: tl.constexpr,
    NUM_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write `tile` at [i, j, row, col]; what reaches past the tensor is dropped."""
    if TMA:
        tensor.store([i, j, row, col], tile.to(tensor.dtype).reshape(1, 1, ROWS, COLS))
    else:
        offs_row = row + tl.arange(0, ROWS)
        offs_col = col + tl.arange(0, COLS)
        inside = (offs_row[:, None] < NUM_ROWS) & (offs_col[None, :] < NUM_COLS)
        ptrs = _tile_ptrs(tensor, strides, i, j, row, col, ROWS, COLS)
        tl.store(ptrs, tile.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def add_tile(
    ptr,
    strides,
    i,
    j,
    row,
    col,
    tile,
    NUM_ROWS: tl.constexpr,
    NUM_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Add `tile` at [i, j, row, col] by atomics, in no fixed order."""
    offs_row = row + tl.arange(0, ROWS)
    offs_col = col + tl.arange(0, COLS)
    inside = (offs_row[:, None] < NUM_ROWS) & (offs_col[None, :] < NUM_COLS)
    tl.atomic_add(_tile_ptrs(ptr, strides, i, j, row, col, ROWS, COLS), tile, mask=inside, sem="relaxed")


@triton.jit
def _tile_ptrs(ptr, strides, i, j, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    # Where the tile starts in 64 bits, for a batch may hold more than 2^31 numbers; within the tile 32 do.
    start = tl.cast(i, tl.int64) * strides[0] + tl.cast(j, tl.int64) * strides[1] + tl.cast(row, tl.int64) * strides[2]
    return ptr + start + col + tl.arange(0, ROWS)[:, None] * strides[2] + tl.arange(0, COLS)[None, :]
