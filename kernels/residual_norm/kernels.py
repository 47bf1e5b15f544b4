"""LayerScale, DropPath, residual add and LayerNorm in one pass over the tokens, and the gradients in another.

In torch, for tokens x, y [R, D] of which `keep` [R] repeats the factor of their picture:

    x_new = (x + keep * gamma * y).to(x.dtype)                                              # [R, D]
    mean, rstd = x_new.mean(1), rsqrt(x_new.var(1, correction=0) + eps)                     # [R]
    normed = (x_new - mean) * rstd * weight + bias                                          # [R, D]

and with the gradients of x_new and normed, xhat = (x_new - mean) * rstd and h = weight * grad_normed:

    grad_x = grad_x_new + rstd * (h - h.mean(1) - xhat * (h * xhat).mean(1))                # [R, D]
    grad_y = keep * gamma * grad_x                                                          # [R, D]
    grad_gamma, grad_weight, grad_bias = (keep * y * grad_x).sum(0), (grad_normed * xhat).sum(0), grad_normed.sum(0)

A pointer that is None leaves out what it stands for: gamma, keep or weight a factor, bias an addend, normed the
LayerNorm, a gradient itself.
Rows are cut as in _triton/rows.py. Everything is computed in ACC.

Not supported: rows that are not contiguous; 2^31 rows or more; bf16 in Triton's interpreter, which computes it wrongly.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel have the types that Triton finds at its launch.

import triton
import triton.language as tl

from .._triton.rows import centre, load_channels, load_rows, standardise, store_partial, store_rows, sum_partials


@triton.jit
def load_keep(keep_ptr, rows, inside, num_tokens, ACC: tl.constexpr):
    """DropPath's factor of the picture of each row; 1 without one."""
    if keep_ptr is None:
        keep = tl.full((rows.shape[0],), 1.0, ACC)
    else:
        keep = tl.load(keep_ptr + rows // num_tokens, mask=inside, other=0.0).to(ACC)
    return keep


@triton.jit
def add_branch(
    x_ptr,
    y_ptr,
    gamma_ptr,
    x_new_ptr,
    keep,
    rows,
    inside,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Store x + keep * gamma * y; and as it was rounded, for that is what is normed."""
    x = load_rows(x_ptr, rows, inside, FIRST, SIZE, D, ACC)
    branch = load_rows(y_ptr, rows, inside, FIRST, SIZE, D, ACC)
    branch *= keep[:, None] * load_channels(gamma_ptr, FIRST, SIZE, D, ACC)[None, :]
    # x + 0 would turn -0 into 0: a dropped picture keeps all its bits.
    x_new = tl.where(branch == 0.0, x, x + branch).to(x_new_ptr.dtype.element_ty)
    store_rows(x_new_ptr, rows, inside, x_new, FIRST, SIZE, D)
    return x_new.to(ACC)


@triton.jit
def store_normed(
    weight_ptr,
    bias_ptr,
    normed_ptr,
    xhat,
    rows,
    inside,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
):
    normed = xhat * load_channels(weight_ptr, FIRST, SIZE, D, ACC)[None, :]
    if bias_ptr is not None:
        normed += load_channels(bias_ptr, FIRST, SIZE, D, ACC)[None, :]
    store_rows(normed_ptr, rows, inside, normed, FIRST, SIZE, D)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def residual_fwd_kernel(
    x_ptr,  # [R, D]
    y_ptr,  # [R, D]
    gamma_ptr,  # [D] or None
    keep_ptr,  # [R / num_tokens] or None
    weight_ptr,  # [D] or None, and so the next
    bias_ptr,
    x_new_ptr,  # [R, D]
    normed_ptr,  # [R, D], or None where nothing is normed
    mean_ptr,  # [R]
    rstd_ptr,  # [R]
    num_rows,
    num_tokens,
    EPS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    keep = load_keep(keep_ptr, rows, inside, num_tokens, ACC)
    main = add_branch(x_ptr, y_ptr, gamma_ptr, x_new_ptr, keep, rows, inside, 0, MAIN, D, ACC)
    tail = None
    if TAIL:
        tail = add_branch(x_ptr, y_ptr, gamma_ptr, x_new_ptr, keep, rows, inside, MAIN, TAIL, D, ACC)
    if normed_ptr is not None:
        main, tail, mean, rstd = standardise(main, tail, EPS, D, MAIN, TAIL)
        tl.store(mean_ptr + rows, mean, mask=inside)
        tl.store(rstd_ptr + rows, rstd, mask=inside)
        store_normed(weight_ptr, bias_ptr, normed_ptr, main, rows, inside, 0, MAIN, D, ACC)
        if TAIL:
            store_normed(weight_ptr, bias_ptr, normed_ptr, tail, rows, inside, MAIN, TAIL, D, ACC)


@triton.jit
def store_branch_grads(
    y_ptr,
    grad_x_ptr,
    grad_y_ptr,
    grad_x,
    keep,
    gamma,
    rows,
    inside,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Store grad_x and grad_y where they are wanted; what these rows give to the gradient of gamma."""
    if grad_x_ptr is not None:
        store_rows(grad_x_ptr, rows, inside, grad_x, FIRST, SIZE, D)
    kept = keep[:, None] * grad_x
    if grad_y_ptr is not None:
        store_rows(grad_y_ptr, rows, inside, gamma[None, :] * kept, FIRST, SIZE, D)
    return load_rows(y_ptr, rows, inside, FIRST, SIZE, D, ACC) * kept


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "rows_a_program"])
def residual_bwd_kernel(
    grad_x_new_ptr,  # [R, D], or None for zeros
    grad_normed_ptr,  # [R, D], or None without the LayerNorm
    x_new_ptr,  # [R, D]
    y_ptr,  # [R, D], or None where gamma needs no gradient
    gamma_ptr,  # [D] or None
    keep_ptr,  # [R / num_tokens] or None
    weight_ptr,  # [D] or None
    mean_ptr,  # [R]
    rstd_ptr,  # [R]
    grad_x_ptr,  # [R, D] or None
    grad_y_ptr,  # [R, D] or None
    gamma_sums_ptr,  # [programs, D] or None, and so the next two
    weight_sums_ptr,
    bias_sums_ptr,
    num_rows,
    num_tokens,
    rows_a_program,  # a multiple of ROWS
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for rows_a_program rows, one after another, ROWS at a time."""
    gamma_main = load_channels(gamma_ptr, 0, MAIN, D, ACC)
    weight_main = load_channels(weight_ptr, 0, MAIN, D, ACC)
    gamma_sums_main = tl.zeros((ROWS, MAIN), ACC)
    weight_sums_main = tl.zeros((ROWS, MAIN), ACC)
    bias_sums_main = tl.zeros((ROWS, MAIN), ACC)
    if TAIL:
        gamma_tail = load_channels(gamma_ptr, MAIN, TAIL, D, ACC)
        weight_tail = load_channels(weight_ptr, MAIN, TAIL, D, ACC)
        gamma_sums_tail = tl.zeros((ROWS, TAIL), ACC)
        weight_sums_tail = tl.zeros((ROWS, TAIL), ACC)
        bias_sums_tail = tl.zeros((ROWS, TAIL), ACC)

    begin = tl.program_id(0) * rows_a_program
    end = tl.minimum(begin + rows_a_program, num_rows)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        inside = rows < end
        keep = load_keep(keep_ptr, rows, inside, num_tokens, ACC)
        grad_main = load_rows(grad_x_new_ptr, rows, inside, 0, MAIN, D, ACC)
        if TAIL:
            grad_tail = load_rows(grad_x_new_ptr, rows, inside, MAIN, TAIL, D, ACC)

        if grad_normed_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=inside, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=inside, other=0.0)
            x_new_main = load_rows(x_new_ptr, rows, inside, 0, MAIN, D, ACC)
            grad_normed_main = load_rows(grad_normed_ptr, rows, inside, 0, MAIN, D, ACC)
            xhat_main = centre(x_new_main, mean, 0, MAIN, D) * rstd[:, None]
            h_main = weight_main[None, :] * grad_normed_main
            h_sum = tl.sum(h_main, axis=1)
            h_xhat_sum = tl.sum(h_main * xhat_main, axis=1)
            if TAIL:
                x_new_tail = load_rows(x_new_ptr, rows, inside, MAIN, TAIL, D, ACC)
                grad_normed_tail = load_rows(grad_normed_ptr, rows, inside, MAIN, TAIL, D, ACC)
                xhat_tail = centre(x_new_tail, mean, MAIN, TAIL, D) * rstd[:, None]
                h_tail = weight_tail[None, :] * grad_normed_tail
                h_sum += tl.sum(h_tail, axis=1)
                h_xhat_sum += tl.sum(h_tail * xhat_tail, axis=1)
            h_mean, h_xhat_mean = h_sum[:, None] / D, h_xhat_sum[:, None] / D
            grad_main += rstd[:, None] * (h_main - h_mean - xhat_main * h_xhat_mean)
            if weight_sums_ptr is not None:
                weight_sums_main += grad_normed_main * xhat_main
            if bias_sums_ptr is not None:
                bias_sums_main += grad_normed_main
            if TAIL:
                grad_tail += rstd[:, None] * (h_tail - h_mean - xhat_tail * h_xhat_mean)
                if weight_sums_ptr is not None:
                    weight_sums_tail += grad_normed_tail * xhat_tail
                if bias_sums_ptr is not None:
                    bias_sums_tail += grad_normed_tail

        gamma_sums_main += store_branch_grads(
            y_ptr, grad_x_ptr, grad_y_ptr, grad_main, keep, gamma_main, rows, inside, 0, MAIN, D, ACC
        )
        if TAIL:
            gamma_sums_tail += store_branch_grads(
                y_ptr, grad_x_ptr, grad_y_ptr, grad_tail, keep, gamma_tail, rows, inside, MAIN, TAIL, D, ACC
            )

    program = tl.program_id(0)
    store_partial(gamma_sums_ptr, program, gamma_sums_main, 0, MAIN, D)
    store_partial(weight_sums_ptr, program, weight_sums_main, 0, MAIN, D)
    store_partial(bias_sums_ptr, program, bias_sums_main, 0, MAIN, D)
    if TAIL:
        store_partial(gamma_sums_ptr, program, gamma_sums_tail, MAIN, TAIL, D)
        store_partial(weight_sums_ptr, program, weight_sums_tail, MAIN, TAIL, D)
        store_partial(bias_sums_ptr, program, bias_sums_tail, MAIN, TAIL, D)


@triton.jit(do_not_specialize=["num_partials"])
def residual_sums_kernel(
    gamma_sums_ptr,  # [P, D] or None, and so the next two
    weight_sums_ptr,
    bias_sums_ptr,
    grad_gamma_ptr,  # [D]
    grad_weight_ptr,
    grad_bias_ptr,
    num_partials,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program for COLS channels of one of the three: the sum of the P partial sums, in an order that P decides."""
    if tl.program_id(1) == 0:
        sum_partials(gamma_sums_ptr, grad_gamma_ptr, num_partials, D, ROWS, COLS)
    elif tl.program_id(1) == 1:
        sum_partials(weight_sums_ptr, grad_weight_ptr, num_partials, D, ROWS, COLS)
    else:
        sum_partials(bias_sums_ptr, grad_bias_ptr, num_partials, D, ROWS, COLS)
