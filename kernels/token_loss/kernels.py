"""Kernels that turn logits into the loss, the accuracy and, in place, their own gradient.

In torch, for logits [R, V] of half precision, targets [R] and E = label_smoothing:

    logits = logits.float()
    log_p = logits.log_softmax(-1)
    loss = -(1 - E) * log_p[target] - E * log_p.mean(-1)         # [R], 0 in rows that do not count
    hit = logits.max(-1).indices == target                       # the first of equal maxima
    logits = logits.softmax(-1) - (1 - E) * one_hot(target) - E / V   # where a gradient is asked, times scale [R]

log_p is never in memory. The loss is written as log(sum exp(x - max)) + (max - x_t) - E mean(x - x_t): a difference of
logits before all sums, so that logits which share a large offset lose no digits. A target is a hit when no logit is
greater and none before it is equal. A target that is neither a token nor `ignore_index` gives NaN.
Not supported: V of 2^31 or more.
"""

# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ignore_index"])
def token_loss_kernel(
    logits_ptr,  # [R, V], overwritten by their gradient with HAS_GRAD
    targets_ptr,  # [R] int64
    loss_ptr,  # [R] in ACC
    hit_ptr,  # [R] in ACC
    scale_ptr,  # [R] in ACC: the gradient of each row's loss
    logits_stride,
    ignore_index,
    LABEL_SMOOTHING: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for one row: the vocabulary once for the loss, and once more, from the cache, for the gradient."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + tl.cast(row, tl.int64) * logits_stride
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    known = (target >= 0) & (target < V)
    # Rows without a token of their own are measured from the first one, which is always there.
    token = tl.where(known, target, 0).to(tl.int32)
    x_target = tl.load(row_ptr + token).to(ACC)

    row_max = tl.full([], float("-inf"), ACC)
    row_sum = tl.zeros([], ACC)
    above_target = tl.zeros([], ACC)
    num_beaten = tl.zeros([], tl.int32)
    for start in tl.range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        mask = offs < V
        x = tl.load(row_ptr + offs, mask=mask, other=float("-inf")).to(ACC)
        new_max = tl.maximum(row_max, tl.max(x, 0))
        # (-inf) - (-inf) is NaN: where all logits so far are -inf, measure from 0.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite_max) + tl.sum(tl.exp(x - finite_max), 0)
        row_max = new_max
        if LABEL_SMOOTHING > 0:
            above_target += tl.sum(tl.where(mask, x - x_target, 0.0), 0)
        beaten = (x < x_target) | ((x == x_target) & (offs >= token))
        num_beaten += tl.sum((beaten & mask).to(tl.int32), 0)

    row_sum = tl.where(counted & (known == 0), float("nan"), row_sum)
    if HAS_LOSS:
        loss = tl.log(row_sum) + (row_max - x_target)
        if LABEL_SMOOTHING > 0:
            loss -= above_target * LABEL_SMOOTHING / V
        tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
        tl.store(hit_ptr + row, (counted & known & (num_beaten == V)).to(ACC))
    if HAS_GRAD:
        scale = tl.full([], 1.0, ACC)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + row)
        for start in tl.range(0, V, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            mask = offs < V
            x = tl.load(row_ptr + offs, mask=mask, other=0.0).to(ACC)
            grad = tl.exp(x - row_max) / row_sum - LABEL_SMOOTHING / V
            grad = tl.where(offs == token, grad - (1.0 - LABEL_SMOOTHING), grad) * scale
            grad = tl.where(counted, grad, 0.0)
            tl.store(row_ptr + offs, grad.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["numel"])
def token_loss_scale_kernel(grad_ptr, factor_ptr, count_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """out = grad * factor / count, in the dtype of the factor and rounded once: one program for BLOCK elements."""
    offs = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    grad = tl.load(grad_ptr + offs, mask=mask).to(factor_ptr.dtype.element_ty)
    out = grad * (tl.load(factor_ptr) / tl.load(count_ptr))
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
