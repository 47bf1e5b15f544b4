"""Scores of a tile of queries and keys, as all attention kernels compute them, and their exponentials."""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

from .._triton.tiles import load_tile, padded

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_scores(
    q_tile,  # [ROWS, BLOCK_D]
    k_tile,  # [COLS, BLOCK_D]
    bias,  # [1, H, N, N]; a descriptor under TMA, else a pointer
    bias_strides,
    mask_ptr,  # [W, 1, N, N]
    mask_strides,
    scale,
    h,
    w,
    start_m,
    start_n,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TAIL: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale * q k^T + bias + mask, [ROWS, COLS]; -inf for keys past the last, which only a TAIL has."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC) * scale
    if HAS_BIAS:
        scores += load_tile(bias, bias_strides, 0, h, start_m, start_n, N, padded(N), ROWS, COLS, TMA).to(ACC)
    if HAS_MASK:
        tile = load_tile(mask_ptr, mask_strides, w, 0, start_m, start_n, N, padded(N), ROWS, COLS, False)
        scores += tile.to(ACC)
    if TAIL:
        scores = tl.where((start_n + tl.arange(0, COLS) < N)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def tile_scores_transposed(
    q_tile,  # [ROWS, BLOCK_D]
    k_tile,  # [COLS, BLOCK_D]
    bias,  # [1, H, N, N]; a descriptor under TMA, else a pointer
    bias_strides,
    mask_ptr,  # [W, 1, N, N]
    mask_strides,
    scale,
    h,
    w,
    start_m,
    start_n,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TAIL: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same with keys as rows, [COLS, ROWS]."""
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC) * scale
    if HAS_BIAS:
        tile = load_tile(bias, bias_strides, 0, h, start_m, start_n, N, padded(N), ROWS, COLS, TMA)
        scores += tl.trans(tile).to(ACC)
    if HAS_MASK:
        tile = load_tile(mask_ptr, mask_strides, w, 0, start_m, start_n, N, padded(N), ROWS, COLS, False)
        scores += tl.trans(tile).to(ACC)
    if TAIL:
        scores = tl.where((start_n + tl.arange(0, COLS) < N)[:, None], scores, float("-inf"))
    return scores


@triton.jit
def exp_difference(x, shift, DTYPE: tl.constexpr, HAS_MASK: tl.constexpr):
    """exp(x - shift), to the precision that the dtype of q, k and v deserves. `shift` is one number a row or column."""
    if DTYPE.primitive_bitwidth == 16 and not HAS_MASK:
        # One multiply-add before exp2: wrong by some 1e-6, which half precision does not see. Not with a mask: its far
        # numbers, as torch.finfo(dtype).min, would leave what the rounding of the second product lacks, or infinity.
        power = x * LOG2E - shift * LOG2E
    elif shift.dtype == x.dtype:
        power = (x - shift) * LOG2E
    else:
        # An lse in float64, in two parts: in fp32 its own rounding would be the largest error of all.
        high = shift.to(x.dtype)
        infinite = high == float("inf")
        low = (tl.where(infinite, 0.0, shift) - tl.where(infinite, 0.0, high).to(shift.dtype)).to(x.dtype)
        power = ((x - high) - low) * LOG2E
    return tl.math.exp2(power)
