"""Kernels that find the best code of each row: a matrix product whose tiles are compared and forgotten.

In torch, for x [R, D], codes [K, D], bias [K]:

    scores = x @ codes.t() + bias                # [R, K], never in memory
    score, index = scores.max(-1)                # [R], [R]; the first of equal maxima, the first NaN before all else

Products of half precision are summed in fp32 and never rounded to half. Not supported: a gradient; K of 2^31 or more.
"""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

from .._triton.tiles import load_tile


@triton.jit(do_not_specialize=["num_rows", "tiles_a_split"])
def nearest_code_kernel(
    x,  # [1, 1, R, D]; a descriptor under TMA, else a pointer, like codes
    codes,  # [1, 1, K, D]
    bias_ptr,  # [K] in ACC
    index_ptr,  # [splits, R] int64
    score_ptr,  # [splits, R] in ACC
    x_strides,
    code_strides,
    num_rows,
    tiles_a_split,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for BLOCK_M rows and one split of the codes: the best of its tiles as they come."""
    NUM_TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    start_m = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    first = split * tiles_a_split
    best = tl.full([BLOCK_M], float("-inf"), ACC)
    # Where every score is -inf none is greater than the others, and the first code is the best.
    best_index = tl.zeros([BLOCK_M], tl.int32) + first * BLOCK_N
    cols = tl.arange(0, BLOCK_N)
    if D <= BLOCK_D:
        x_tile = load_tile(x, x_strides, 0, 0, start_m, 0, num_rows, D, BLOCK_M, BLOCK_D, TMA)
    for tile in tl.range(first, min(first + tiles_a_split, NUM_TILES)):
        start_n = tile * BLOCK_N
        if D <= BLOCK_D:
            code_tile = load_tile(codes, code_strides, 0, 0, start_n, 0, K, D, BLOCK_N, BLOCK_D, TMA)
            scores = tl.dot(x_tile, code_tile.T, input_precision=PRECISION, out_dtype=ACC)
        else:
            scores = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            for start_d in tl.range(0, D, BLOCK_D):
                piece = load_tile(x, x_strides, 0, 0, start_m, start_d, num_rows, D, BLOCK_M, BLOCK_D, TMA)
                code_tile = load_tile(codes, code_strides, 0, 0, start_n, start_d, K, D, BLOCK_N, BLOCK_D, TMA)
                scores = tl.dot(piece, code_tile.T, scores, input_precision=PRECISION, out_dtype=ACC)
        if HAS_BIAS:
            scores += tl.load(bias_ptr + start_n + cols, mask=start_n + cols < K, other=0.0)[None, :]
        if K % BLOCK_N:
            scores = tl.where((start_n + cols < K)[None, :], scores, float("-inf"))
        top = tl.reduce(scores, 1, _larger)
        is_top = (scores == top[:, None]) | (scores != scores)
        col = tl.min(tl.where(is_top, cols[None, :], BLOCK_N), 1)
        better = _beats(top, best)
        best = tl.where(better, top, best)
        best_index = tl.where(better, start_n + col, best_index)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs = tl.cast(split, tl.int64) * num_rows + offs_m
    tl.store(score_ptr + offs, best, mask=offs_m < num_rows)
    tl.store(index_ptr + offs, best_index.to(tl.int64), mask=offs_m < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def nearest_code_join_kernel(
    split_index_ptr,  # [splits, R]
    split_score_ptr,
    index_ptr,  # [R]
    score_ptr,
    num_rows,
    num_splits,
    BLOCK_R: tl.constexpr,
):
    """One program for BLOCK_R rows: the best of the splits, from the first to the last."""
    offs = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < num_rows
    best = tl.load(split_score_ptr + offs, mask=mask)
    best_index = tl.load(split_index_ptr + offs, mask=mask)
    for split in tl.range(1, num_splits):
        split_offs = tl.cast(split, tl.int64) * num_rows + offs
        score = tl.load(split_score_ptr + split_offs, mask=mask)
        better = _beats(score, best)
        best = tl.where(better, score, best)
        best_index = tl.where(better, tl.load(split_index_ptr + split_offs, mask=mask), best_index)
    tl.store(score_ptr + offs, best, mask=mask)
    tl.store(index_ptr + offs, best_index, mask=mask)


@triton.jit
def _larger(a, b):
    """The larger one, NaN where there is one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _beats(new, old):
    """Whether a later score takes the place of an earlier one: only a greater one does, or the first NaN."""
    return (new > old) | ((new != new) & (old == old))
