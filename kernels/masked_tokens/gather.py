"""The masked rows alone, through LayerNorm or as they are, and the gradient of all: the kernels of gather_masked.

For slot m of a picture with patch p = positions[m] and x = row `prefix + p` of its tokens:

    mean, rstd = x.mean(), rsqrt(x.var(correction=0) + eps)
    out        = (x - mean) * rstd * weight + bias;  zeros where p is -1

and with xhat = (x - mean) * rstd and h = weight * grad, over the channels of a row:

    grad_x = rstd * (h - h.mean() - xhat * (h * xhat).mean())                       zeros for rows that no slot has
    grad_weight, grad_bias = (grad * xhat), grad                                    summed over the slots

Without a weight there is no LayerNorm: out = x, grad_x = grad, and neither mean nor rstd. Without a bias none is added.

The backward goes over the rows of x, finds the slot of each and writes it once: no atomics, no zeros written first.

B pictures, N tokens, M slots in `positions` int64 [B, M], D channels. Rows are cut as in _triton/rows.py.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel have the types that Triton finds at its launch.

import triton
import triton.language as tl

from .._triton.rows import centre, load_channels, load_rows, standardise, store_partial, store_rows, sum_partials
from .slots import find_slots


@triton.jit
def store_normed(
    weight_ptr,
    bias_ptr,
    out_ptr,
    xhat,
    rows,
    inside,
    is_slot,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
):
    normed = xhat * load_channels(weight_ptr, FIRST, SIZE, D, ACC)[None, :]
    if bias_ptr is not None:
        normed += load_channels(bias_ptr, FIRST, SIZE, D, ACC)[None, :]
    store_rows(out_ptr, rows, inside, tl.where(is_slot[:, None], normed, 0.0), FIRST, SIZE, D)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_slots", "num_prefix_tokens"])
def gather_fwd_kernel(
    x_ptr,  # [B, N, D]
    positions_ptr,  # int64 [B, M]
    weight_ptr,  # [D] or None, and so the next
    bias_ptr,
    out_ptr,  # [B, M, D]
    mean_ptr,  # [B, M] or None without a weight, and so the next
    rstd_ptr,
    num_rows,  # B * M
    num_tokens,
    num_slots,
    num_prefix_tokens,
    EPS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for ROWS slots."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    patches = tl.load(positions_ptr + rows, mask=inside, other=-1).to(tl.int32)
    is_slot = (patches >= 0) & (patches < num_tokens - num_prefix_tokens)
    x_rows = (rows // num_slots) * num_tokens + num_prefix_tokens + patches
    main = load_rows(x_ptr, x_rows, is_slot, 0, MAIN, D, ACC)
    tail = None
    if TAIL:
        tail = load_rows(x_ptr, x_rows, is_slot, MAIN, TAIL, D, ACC)
    if weight_ptr is None:
        store_rows(out_ptr, rows, inside, main, 0, MAIN, D)
        if TAIL:
            store_rows(out_ptr, rows, inside, tail, MAIN, TAIL, D)
    else:
        main, tail, mean, rstd = standardise(main, tail, EPS, D, MAIN, TAIL)
        tl.store(mean_ptr + rows, mean, mask=inside)
        tl.store(rstd_ptr + rows, rstd, mask=inside)
        store_normed(weight_ptr, bias_ptr, out_ptr, main, rows, inside, is_slot, 0, MAIN, D, ACC)
        if TAIL:
            store_normed(weight_ptr, bias_ptr, out_ptr, tail, rows, inside, is_slot, MAIN, TAIL, D, ACC)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_slots", "num_prefix_tokens", "rows_a_program"])
def gather_bwd_kernel(
    grad_ptr,  # [B, M, D]
    x_ptr,  # [B, N, D]; None without a weight, and so the next four
    positions_ptr,  # int64 [B, M]
    weight_ptr,  # [D]
    mean_ptr,  # [B, M]
    rstd_ptr,  # [B, M]
    grad_x_ptr,  # [B, N, D] or None
    weight_sums_ptr,  # [programs, D] or None, and so the next
    bias_sums_ptr,
    num_rows,  # B * N
    num_tokens,
    num_slots,
    num_prefix_tokens,
    rows_a_program,  # a multiple of ROWS
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for rows_a_program rows of x, one after another, ROWS at a time."""
    weight_main = load_channels(weight_ptr, 0, MAIN, D, ACC)
    weight_sums_main = tl.zeros((ROWS, MAIN), ACC)
    bias_sums_main = tl.zeros((ROWS, MAIN), ACC)
    if TAIL:
        weight_tail = load_channels(weight_ptr, MAIN, TAIL, D, ACC)
        weight_sums_tail = tl.zeros((ROWS, TAIL), ACC)
        bias_sums_tail = tl.zeros((ROWS, TAIL), ACC)

    begin = tl.program_id(0) * rows_a_program
    end = tl.minimum(begin + rows_a_program, num_rows)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        inside = rows < end
        pictures = rows // num_tokens
        patches = rows % num_tokens - num_prefix_tokens
        slots = find_slots(positions_ptr, pictures, patches, inside, num_slots, CHUNK, CHUNKS)
        is_slot = slots >= 0
        grad_rows = pictures * num_slots + slots
        grad_main = load_rows(grad_ptr, grad_rows, is_slot, 0, MAIN, D, ACC)
        if TAIL:
            grad_tail = load_rows(grad_ptr, grad_rows, is_slot, MAIN, TAIL, D, ACC)
        if weight_ptr is None:
            store_rows(grad_x_ptr, rows, inside, grad_main, 0, MAIN, D)
            if TAIL:
                store_rows(grad_x_ptr, rows, inside, grad_tail, MAIN, TAIL, D)
        else:
            mean = tl.load(mean_ptr + grad_rows, mask=is_slot, other=0.0)
            rstd = tl.load(rstd_ptr + grad_rows, mask=is_slot, other=0.0)
            xhat_main = centre(load_rows(x_ptr, rows, is_slot, 0, MAIN, D, ACC), mean, 0, MAIN, D) * rstd[:, None]
            h_main = weight_main[None, :] * grad_main
            h_sum = tl.sum(h_main, axis=1)
            h_xhat_sum = tl.sum(h_main * xhat_main, axis=1)
            if TAIL:
                x_tail = load_rows(x_ptr, rows, is_slot, MAIN, TAIL, D, ACC)
                xhat_tail = centre(x_tail, mean, MAIN, TAIL, D) * rstd[:, None]
                h_tail = weight_tail[None, :] * grad_tail
                h_sum += tl.sum(h_tail, axis=1)
                h_xhat_sum += tl.sum(h_tail * xhat_tail, axis=1)
            h_mean, h_xhat_mean = h_sum[:, None] / D, h_xhat_sum[:, None] / D
            if grad_x_ptr is not None:
                grad_x_main = rstd[:, None] * (h_main - h_mean - xhat_main * h_xhat_mean)
                store_rows(grad_x_ptr, rows, inside, grad_x_main, 0, MAIN, D)
            if weight_sums_ptr is not None:
                weight_sums_main += grad_main * xhat_main
            if bias_sums_ptr is not None:
                bias_sums_main += grad_main
            if TAIL:
                if grad_x_ptr is not None:
                    grad_x_tail = rstd[:, None] * (h_tail - h_mean - xhat_tail * h_xhat_mean)
                    store_rows(grad_x_ptr, rows, inside, grad_x_tail, MAIN, TAIL, D)
                if weight_sums_ptr is not None:
                    weight_sums_tail += grad_tail * xhat_tail
                if bias_sums_ptr is not None:
                    bias_sums_tail += grad_tail

    program = tl.program_id(0)
    store_partial(weight_sums_ptr, program, weight_sums_main, 0, MAIN, D)
    store_partial(bias_sums_ptr, program, bias_sums_main, 0, MAIN, D)
    if TAIL:
        store_partial(weight_sums_ptr, program, weight_sums_tail, MAIN, TAIL, D)
        store_partial(bias_sums_ptr, program, bias_sums_tail, MAIN, TAIL, D)


@triton.jit(do_not_specialize=["num_partials"])
def gather_sums_kernel(
    weight_sums_ptr,  # [P, D] or None, and so the next
    bias_sums_ptr,
    grad_weight_ptr,  # [D]
    grad_bias_ptr,
    num_partials,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program for COLS channels of one of the two."""
    if tl.program_id(1) == 0:
        sum_partials(weight_sums_ptr, grad_weight_ptr, num_partials, D, ROWS, COLS)
    else:
        sum_partials(bias_sums_ptr, grad_bias_ptr, num_partials, D, ROWS, COLS)
