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
    KEYS_FIRST: tl.constexpr = False,
):
    """scale * q k^T + bias + mask, [ROWS, COLS], or transposed with KEYS_FIRST.

    TAIL: keys of the tile may be past the last one; those get -inf.
    """
    if KEYS_FIRST:
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC) * scale
    else:
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC) * scale
    if HAS_BIAS:
        tile = load_tile(bias, bias_strides, 0, h, start_m, start_n, N, padded(N), ROWS, COLS, TMA)
        scores += (tl.trans(tile) if KEYS_FIRST else tile).to(ACC)
    if HAS_MASK:
        tile = load_tile(mask_ptr, mask_strides, w, 0, start_m, start_n, N, padded(N), ROWS, COLS, False)
        scores += (tl.trans(tile) if KEYS_FIRST else tile).to(ACC)
    if TAIL:
        is_key = start_n + tl.arange(0, COLS) < N
        scores = tl.where(is_key[:, None] if KEYS_FIRST else is_key[None, :], scores, float("-inf"))
    return scores


@triton.jit
def load_keys(
    q_tile,  # [ROWS, BLOCK_D]
    k,  # [B, H, N, D]; descriptors under TMA, else pointers, like v and bias
    k_strides,
    v,
    v_strides,
    bias,  # [1, H, N, N]
    bias_strides,
    mask_ptr,  # [W, 1, N, N]
    mask_strides,
    scale,
    b,
    h,
    w,
    start_m,
    start_n,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TAIL: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """COLS keys and their values, [COLS, BLOCK_D] each, and the scores [ROWS, COLS] of the queries with them."""
    k_tile = load_tile(k, k_strides, b, h, start_n, 0, N, D, COLS, BLOCK_D, TMA, INSIDE=not TAIL)
    v_tile = load_tile(v, v_strides, b, h, start_n, 0, N, D, COLS, BLOCK_D, TMA, INSIDE=not TAIL)
    scores = tile_scores(
        q_tile, k_tile, bias, bias_strides, mask_ptr, mask_strides, scale, h, w, start_m, start_n,
        N, ROWS, COLS, HAS_BIAS, HAS_MASK, TAIL, TMA, ACC, PRECISION,
    )  # fmt: skip
    return k_tile, v_tile, scores


@triton.jit
def exp_difference(x, shift, EXACT: tl.constexpr):
    """exp(x - shift). `shift` is one number a row or column.

    Unless EXACT it is one multiply-add before exp2: wrong by some 1e-6, which half precision does not see. Not with a
    mask: its far numbers, as torch.finfo(dtype).min, would leave what the rounding of the second product lacks, or
    infinity.
    """
    power = (x - shift) * LOG2E if EXACT else x * LOG2E - shift * LOG2E
    return tl.math.exp2(power)


@triton.jit
def store_lse(lse_ptr, rows, row_max, row_sum, inside, EXACT: tl.constexpr):
    """Keep what a backward rebuilds probabilities from: lse = row_max + log(row_sum), or both if EXACT.

    Beside a mask's far numbers lse would lose the logarithm, and in fp32 its rounding would be the largest error.
    Where there is no key the maximum is kept as +inf, so that probabilities are 0.
    """
    no_key = row_sum == 0
    row_sum = tl.where(no_key, 1.0, row_sum)
    if EXACT:
        tl.store(lse_ptr + 2 * rows, tl.where(no_key, float("inf"), row_max), mask=inside)
        tl.store(lse_ptr + 2 * rows + 1, row_sum, mask=inside)
    else:
        lse = tl.where(no_key, float("inf"), row_max + tl.math.log2(row_sum) * LN2)
        tl.store(lse_ptr + rows, lse, mask=inside)


@triton.jit
def load_lse(lse_ptr, rows, inside, EXACT: tl.constexpr):
    """What `store_lse` kept, as a shift and a factor of `probabilities`: 0 where not inside."""
    if EXACT:
        shift = tl.load(lse_ptr + 2 * rows, mask=inside, other=float("inf"))
        factor = 1.0 / tl.load(lse_ptr + 2 * rows + 1, mask=inside, other=1.0)
    else:
        shift = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
        factor = shift  # is not used
    return shift, factor


@triton.jit
def probabilities(scores, shift, factor, EXACT: tl.constexpr):
    """softmax(scores), rebuilt by what `load_lse` gave, each with an axis of size 1."""
    weights = exp_difference(scores, shift, EXACT)
    return weights * factor if EXACT else weights
