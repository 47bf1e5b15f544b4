"""Backward kernels: gradients of q, k, v and of the bias that all pictures share.

In torch, for one picture and head, with probabilities p = exp(scores - lse) rebuilt from the forward's `lse`:

    delta = (grad_out * out).sum(-1)
    grad_v = p.T @ grad_out
    grad_scores = p * (grad_out @ v.T - delta[:, None])
    grad_q = scale * grad_scores @ k
    grad_k = scale * grad_scores.T @ q
    grad_bias = grad_scores.sum(pictures)                 # without the scale, which the bias does not get

`attention_bwd_q_kernel` holds queries and makes delta and grad_q, `attention_bwd_kv_kernel` holds keys and makes the
rest. Each computes scores and grad_out @ v.T for itself, so that the formulas' five products are seven.

grad_scores leave a kernel in one of two ways, by BIAS_GRAD:

    STORE   to memory, for as many pictures as the launcher gives room, and `bias_grad_sum_kernel` sums them in order
    ADD     by atomics into one fp32 [H, N, N], in no fixed order
    REDUCE  the same by TMA, which takes no registers for addresses; Triton's interpreter does not know it
"""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl

from .._triton.tiles import add_tile, load_tile, padded, store_tile
from .scores import load_keys, load_lse, probabilities, tile_scores

NONE = tl.constexpr(0)
STORE = tl.constexpr(1)
ADD = tl.constexpr(2)
REDUCE = tl.constexpr(3)


@triton.jit
def attention_bwd_q_kernel(
    q,  # [B, H, N, D]; a descriptor under TMA, else a pointer, like the ten below
    k,
    v,
    k_tail,
    v_tail,
    bias,  # [1, H, N, N]
    bias_tail,
    out,  # [B, H, N, D]
    grad_out,
    grad_q,
    mask_ptr,  # [W, 1, N, N]
    lse_ptr,  # [B, H, N], contiguous, like delta; [B, H, N, 2] where EXACT
    delta_ptr,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    out_strides,
    grad_out_strides,
    grad_q_strides,
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
    WANT_QKV: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for BLOCK_M queries of one head of one picture: delta, and grad_q where it is wanted."""
    NUM_BLOCKS_M: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    MAIN_N: tl.constexpr = N // BLOCK_N * BLOCK_N
    picture_head = tl.program_id(0) // NUM_BLOCKS_M
    start_m = tl.program_id(0) % NUM_BLOCKS_M * BLOCK_M
    b = picture_head // num_heads
    h = picture_head % num_heads
    w = b % num_masks
    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = picture_head.to(tl.int64) * N + offs_m

    grad_tile = load_tile(grad_out, grad_out_strides, b, h, start_m, 0, N, D, BLOCK_M, BLOCK_D, TMA)
    out_tile = load_tile(out, out_strides, b, h, start_m, 0, N, D, BLOCK_M, BLOCK_D, TMA)
    delta = tl.sum(out_tile.to(ACC) * grad_tile.to(ACC), 1)
    tl.store(delta_ptr + rows, delta, mask=offs_m < N)
    if WANT_QKV:
        q_tile = load_tile(q, q_strides, b, h, start_m, 0, N, D, BLOCK_M, BLOCK_D, TMA)
        shift, factor = load_lse(lse_ptr, rows, offs_m < N, EXACT)
        acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        for start_n in tl.range(0, MAIN_N, BLOCK_N):
            k_tile, v_tile, scores = load_keys(
                q_tile, k, k_strides, v, v_strides, bias, bias_strides, mask_ptr, mask_strides, scale, b, h, w, start_m,
                start_n, N, D, BLOCK_D, BLOCK_M, BLOCK_N, HAS_BIAS, HAS_MASK, False, TMA, ACC, PRECISION,
            )  # fmt: skip
            acc = _add_grad_q(acc, scores, k_tile, v_tile, grad_tile, shift, factor, delta, EXACT, ACC, PRECISION)
        if TAIL_N:
            k_tile, v_tile, scores = load_keys(
                q_tile, k_tail, k_strides, v_tail, v_strides, bias_tail, bias_strides, mask_ptr, mask_strides, scale, b,
                h, w, start_m, MAIN_N, N, D, BLOCK_D, BLOCK_M, TAIL_N, HAS_BIAS, HAS_MASK, True, TMA, ACC, PRECISION,
            )  # fmt: skip
            acc = _add_grad_q(acc, scores, k_tile, v_tile, grad_tile, shift, factor, delta, EXACT, ACC, PRECISION)
        store_tile(grad_q, grad_q_strides, b, h, start_m, 0, acc * scale, N, D, BLOCK_M, BLOCK_D, TMA)


@triton.jit
def _add_grad_q(
    acc,
    scores,
    k_tile,
    v_tile,
    grad_tile,
    shift,
    factor,
    delta,
    EXACT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    weights = probabilities(scores, shift[:, None], factor[:, None], EXACT)
    grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC)
    grad_scores = (weights * (grad_weights - delta[:, None])).to(k_tile.dtype)
    return tl.dot(grad_scores, k_tile, acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def attention_bwd_kv_kernel(
    q,  # [B, H, N, D]; a descriptor under TMA, else a pointer, like the eleven below
    k,
    v,
    q_tail,
    bias,  # [1, H, N, N]
    bias_tail,
    grad_out,
    grad_out_tail,
    grad_k,
    grad_v,
    grad_scores,  # [C, H, N, N], keys as rows; C: pictures of this launch for STORE, 1 for ADD (a pointer) and REDUCE
    grad_scores_tail,
    mask_ptr,  # [W, 1, N, N]
    lse_ptr,  # [B, H, N], contiguous, like delta; [B, H, N, 2] where EXACT
    delta_ptr,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    grad_out_strides,
    grad_k_strides,
    grad_v_strides,
    grad_scores_strides,
    mask_strides,
    scale,
    first_picture,
    num_heads,
    num_masks,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    WANT_QKV: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for BLOCK_N keys of one head of one picture: grad_k, grad_v and its share of grad_bias."""
    NUM_BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    MAIN_M: tl.constexpr = N // BLOCK_M * BLOCK_M
    slot = tl.program_id(0) // NUM_BLOCKS_N // num_heads
    h = tl.program_id(0) // NUM_BLOCKS_N % num_heads
    start_n = tl.program_id(0) % NUM_BLOCKS_N * BLOCK_N
    b = first_picture + slot
    w = b % num_masks

    k_tile = load_tile(k, k_strides, b, h, start_n, 0, N, D, BLOCK_N, BLOCK_D, TMA)
    v_tile = load_tile(v, v_strides, b, h, start_n, 0, N, D, BLOCK_N, BLOCK_D, TMA)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for start_m in tl.range(0, MAIN_M, BLOCK_M):
        acc_k, acc_v = _take_queries(
            acc_k, acc_v, k_tile, v_tile, q, q_strides, grad_out, grad_out_strides, bias, bias_strides, grad_scores,
            grad_scores_strides, mask_ptr, mask_strides, lse_ptr, delta_ptr, scale, slot, b, h, w, num_heads,
            start_m, start_n,
            N, D, BLOCK_D, BLOCK_M, BLOCK_N, True, HAS_BIAS, HAS_MASK, EXACT, WANT_QKV, BIAS_GRAD, TMA, ACC, PRECISION,
        )  # fmt: skip
    if TAIL_M:
        acc_k, acc_v = _take_queries(
            acc_k, acc_v, k_tile, v_tile, q_tail, q_strides, grad_out_tail, grad_out_strides, bias_tail, bias_strides,
            grad_scores_tail, grad_scores_strides, mask_ptr, mask_strides, lse_ptr, delta_ptr, scale, slot, b, h, w,
            num_heads, MAIN_M, start_n,
            N, D, BLOCK_D, TAIL_M, BLOCK_N, False, HAS_BIAS, HAS_MASK, EXACT, WANT_QKV, BIAS_GRAD, TMA, ACC, PRECISION,
        )  # fmt: skip
    if WANT_QKV:
        store_tile(grad_k, grad_k_strides, b, h, start_n, 0, acc_k * scale, N, D, BLOCK_N, BLOCK_D, TMA)
        store_tile(grad_v, grad_v_strides, b, h, start_n, 0, acc_v, N, D, BLOCK_N, BLOCK_D, TMA)


@triton.jit
def _take_queries(
    acc_k,  # [COLS, BLOCK_D]
    acc_v,
    k_tile,  # [COLS, BLOCK_D]
    v_tile,
    q,
    q_strides,
    grad_out,
    grad_out_strides,
    bias,
    bias_strides,
    grad_scores,
    grad_scores_strides,
    mask_ptr,
    mask_strides,
    lse_ptr,
    delta_ptr,
    scale,
    slot,
    b,
    h,
    w,
    num_heads,
    start_m,
    start_n,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INSIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    WANT_QKV: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take ROWS queries into the sums of COLS keys and values, and give their grad_scores away."""
    q_tile = load_tile(q, q_strides, b, h, start_m, 0, N, D, ROWS, BLOCK_D, TMA, INSIDE=INSIDE)
    grad_tile = load_tile(grad_out, grad_out_strides, b, h, start_m, 0, N, D, ROWS, BLOCK_D, TMA, INSIDE=INSIDE)
    scores = tile_scores(
        q_tile, k_tile, bias, bias_strides, mask_ptr, mask_strides, scale, h, w, start_m, start_n,
        N, ROWS, COLS, HAS_BIAS, HAS_MASK, N % COLS != 0, TMA, ACC, PRECISION, KEYS_FIRST=True,
    )  # fmt: skip
    offs_m = start_m + tl.arange(0, ROWS)
    rows = tl.cast(b * num_heads + h, tl.int64) * N + offs_m
    shift, factor = load_lse(lse_ptr, rows, offs_m < N, EXACT)
    delta = tl.load(delta_ptr + rows, mask=offs_m < N, other=0.0)
    weights = probabilities(scores, shift[None, :], factor[None, :], EXACT)
    if WANT_QKV:
        acc_v = tl.dot(weights.to(grad_tile.dtype), grad_tile, acc_v, input_precision=PRECISION, out_dtype=ACC)
    grad_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION, out_dtype=ACC)
    tile = weights * (grad_weights - delta[None, :])
    if WANT_QKV:
        acc_k = tl.dot(tile.to(q_tile.dtype), q_tile, acc_k, input_precision=PRECISION, out_dtype=ACC)
    _give_grad_scores(
        grad_scores, grad_scores_strides, slot, h, start_n, start_m, tile, N, COLS, ROWS, BIAS_GRAD, TMA
    )  # fmt: skip
    return acc_k, acc_v


@triton.jit
def _give_grad_scores(
    grad_scores, strides, slot, h, start_n, start_m, tile,
    N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BIAS_GRAD: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if BIAS_GRAD == STORE:
        store_tile(grad_scores, strides, slot, h, start_n, start_m, tile, N, padded(N), ROWS, COLS, TMA)
    if BIAS_GRAD == ADD:
        add_tile(grad_scores, strides, 0, h, start_n, start_m, tile, N, padded(N), ROWS, COLS)
    if BIAS_GRAD == REDUCE:
        grad_scores.atomic_add([0, h, start_n, start_m], tile.reshape(1, 1, ROWS, COLS))


@triton.jit
def bias_grad_sum_kernel(
    grad_scores_ptr,  # [C, H, N, N], keys as rows
    grad_bias_ptr,  # [H, N, N], contiguous, queries as rows
    grad_scores_strides,
    num_pictures,  # C
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ADD_TO: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for BLOCK_M queries and BLOCK_N keys of one head: the sum over pictures, first to last.

    With ADD_TO the sum goes on from what grad_bias holds, so that it is the same bits in however many passes.
    """
    NUM_BLOCKS_M: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    NUM_BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    h = tl.program_id(0) // (NUM_BLOCKS_M * NUM_BLOCKS_N)
    start_m = tl.program_id(0) % NUM_BLOCKS_M * BLOCK_M
    start_n = tl.program_id(0) // NUM_BLOCKS_M % NUM_BLOCKS_N * BLOCK_N
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    # Keys as rows, like what is summed; memory has queries as rows.
    inside = (offs_m[None, :] < N) & (offs_n[:, None] < N)
    ptrs = grad_bias_ptr + h.to(tl.int64) * N * N + offs_m[None, :] * N + offs_n[:, None]
    if ADD_TO:  # noqa: SIM108  (the branch is taken when compiled)
        total = tl.load(ptrs, mask=inside, other=0.0).to(ACC)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    for c in tl.range(0, num_pictures):
        tile = load_tile(
            grad_scores_ptr, grad_scores_strides, c, h, start_n, start_m, N, padded(N), BLOCK_N, BLOCK_M, False
        )
        total += tl.where(inside, tile.to(ACC), 0.0)
    tl.store(ptrs, total.to(grad_bias_ptr.dtype.element_ty), mask=inside)
