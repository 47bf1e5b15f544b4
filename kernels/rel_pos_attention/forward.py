"""Forward kernel: attention with an additive bias that all pictures share.

In torch, for q, k, v [B, H, N, D], bias [H, N, N] and mask [W, 1 or N, N] (picture b uses mask[b % W]):

    scores = scale * q @ k.transpose(-2, -1) + bias + mask       # [B, H, N, N], never in memory
    out = scores.softmax(-1) @ v                                 # [B, H, N, D]
    lse = scores.logsumexp(-1)                                   # [B, H, N], or its two parts: see store_lse

A query whose scores are all -inf gets zeros, and zero probabilities in the backward.
Not supported: dropout, a gradient of the mask, other key than query lengths.
"""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

from .._triton.tiles import load_tile, store_tile
from .scores import exp_difference, load_keys, store_lse


@triton.jit
def attention_fwd_kernel(
    q,  # [B, H, N, D]; a descriptor under TMA, else a pointer, like the six below
    k,
    v,
    k_tail,  # k, v and bias once more, for the shorter last tile of keys
    v_tail,
    bias,  # [1, H, N, N]
    bias_tail,
    out,  # [B, H, N, D]
    mask_ptr,  # [W, 1, N, N]
    lse_ptr,  # [B, H, N], contiguous, or [B, H, N, 2] where EXACT
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    out_strides,
    mask_strides,
    scale,
    num_heads,
    num_masks,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for BLOCK_M queries of one head of one picture: softmax over the keys as they come."""
    NUM_BLOCKS_M: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    MAIN_N: tl.constexpr = N // BLOCK_N * BLOCK_N
    picture_head = tl.program_id(0) // NUM_BLOCKS_M
    start_m = tl.program_id(0) % NUM_BLOCKS_M * BLOCK_M
    b = picture_head // num_heads
    h = picture_head % num_heads
    w = b % num_masks

    q_tile = load_tile(q, q_strides, b, h, start_m, 0, N, D, BLOCK_M, BLOCK_D, TMA)
    row_max = tl.full([BLOCK_M], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start_n in tl.range(0, MAIN_N, BLOCK_N):
        _, v_tile, scores = load_keys(
            q_tile, k, k_strides, v, v_strides, bias, bias_strides, mask_ptr, mask_strides, scale, b, h, w, start_m,
            start_n, N, D, BLOCK_D, BLOCK_M, BLOCK_N, HAS_BIAS, HAS_MASK, False, TMA, ACC, PRECISION,
        )  # fmt: skip
        row_max, row_sum, acc = _online_softmax(scores, v_tile, row_max, row_sum, acc, EXACT, ACC, PRECISION)
    if TAIL_N:
        _, v_tile, scores = load_keys(
            q_tile, k_tail, k_strides, v_tail, v_strides, bias_tail, bias_strides, mask_ptr, mask_strides, scale, b, h,
            w, start_m, MAIN_N, N, D, BLOCK_D, BLOCK_M, TAIL_N, HAS_BIAS, HAS_MASK, True, TMA, ACC, PRECISION,
        )  # fmt: skip
        row_max, row_sum, acc = _online_softmax(scores, v_tile, row_max, row_sum, acc, EXACT, ACC, PRECISION)

    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    store_tile(out, out_strides, b, h, start_m, 0, acc, N, D, BLOCK_M, BLOCK_D, TMA)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    store_lse(lse_ptr, picture_head.to(tl.int64) * N + offs_m, row_max, row_sum, offs_m < N, EXACT)


@triton.jit
def _online_softmax(
    scores, v_tile, row_max, row_sum, acc, EXACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """Take one tile of keys into the running maximum, sum and product (arXiv:2205.14135, algorithm 1)."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # (-inf) - (-inf) is NaN: where no key was seen yet, measure from 0.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = exp_difference(row_max, finite_max, EXACT)
    weights = exp_difference(scores, finite_max[:, None], EXACT)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    return new_max, row_sum, acc
