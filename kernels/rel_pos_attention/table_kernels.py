"""Kernels between the table of biases and the dense bias: expand once a step, scatter its gradient back once a step.

In torch, for a table [R, H], row = relative_position_index(window, cls_token) [N, N] and a gradient [H, N, N]:

    bias = table[row].permute(2, 0, 1)                                                      # [H, N, N]
    d_table = zeros(R, H).index_add(0, row.flatten(), d_bias.flatten(1).t())                # [R, H]

No index is read: row is arithmetic, and so are the pairs of a row. With an offset (dy, dx) they are a rectangle of
(Wh - |dy|)(Ww - |dx|) queries, each with the key that lies (dy, dx) before it; with CLS they are a matrix row, a column
and one element. One program sums a row, in fp32 (float64 for float64) and in a fixed order, without atomics.

Not supported: N*N of 2^31 or more; bf16 in Triton's interpreter, which computes it wrongly.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel have the types that Triton finds at its launch.

import triton
import triton.language as tl
from torch import Tensor

from .._triton.launching import on_device

# For every architecture: the tiles fit the registers of each. Not measured on any yet.
EXPAND_CONFIG = {"BLOCK_H": 4, "BLOCK_N": 256, "num_warps": 4, "enable_fp_fusion": False}
SCATTER_CONFIG = {"BLOCK_H": 4, "BLOCK_PAIRS": 256, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def table_row(query, key, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HAS_CLS: tl.constexpr):
    """Row of the table for a query and a key, tokens of any shapes that broadcast."""
    FIRST: tl.constexpr = 1 if HAS_CLS else 0
    NUM_OFFSETS: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    query_patch, key_patch = query - FIRST, key - FIRST
    dy = query_patch // WINDOW_W - key_patch // WINDOW_W
    dx = query_patch % WINDOW_W - key_patch % WINDOW_W
    row = (dy + WINDOW_H - 1) * (2 * WINDOW_W - 1) + dx + WINDOW_W - 1
    if HAS_CLS:
        row = tl.where(key == 0, NUM_OFFSETS + 1, row)
        row = tl.where(query == 0, tl.where(key == 0, NUM_OFFSETS + 2, NUM_OFFSETS), row)
    return row


@triton.jit
def table_expand_kernel(
    table_ptr,  # [R, H]
    bias_ptr,  # [H, N, N]; rows have num_cols elements in memory, the last ones padding
    table_stride_r,
    table_stride_h,
    bias_stride_h,
    bias_stride_i,
    num_heads,
    num_cols,
    NUM_TOKENS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HAS_CLS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for one query, BLOCK_N keys and BLOCK_H heads; zeros in the padding."""
    query = tl.program_id(0)
    key = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    row = table_row(query, key, WINDOW_H, WINDOW_W, HAS_CLS)[None, :]
    is_token = (head < num_heads) & (key < NUM_TOKENS)[None, :]
    bias = tl.load(table_ptr + row * table_stride_r + head * table_stride_h, mask=is_token, other=0.0)  # [H, N]
    bias_ptrs = bias_ptr + head.to(tl.int64) * bias_stride_h + query * bias_stride_i + key[None, :]
    tl.store(bias_ptrs, bias.to(bias_ptr.dtype.element_ty), mask=(head < num_heads) & (key < num_cols)[None, :])


@triton.jit
def table_scatter_kernel(
    grad_ptr,  # [H, N, N]
    out_ptr,  # [R, H], contiguous, in the dtype of the sums
    grad_stride_h,
    grad_stride_i,
    grad_stride_j,
    num_heads,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HAS_CLS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """One program for one row of the table and BLOCK_H heads: the sum of the gradient over the pairs of that row."""
    FIRST: tl.constexpr = 1 if HAS_CLS else 0
    NUM_OFFSETS: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    acc_dtype = out_ptr.dtype.element_ty
    row = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)

    dy = row // (2 * WINDOW_W - 1) - (WINDOW_H - 1)
    dx = row % (2 * WINDOW_W - 1) - (WINDOW_W - 1)
    pairs_x = WINDOW_W - tl.abs(dx)
    num_pairs = (WINDOW_H - tl.abs(dy)) * pairs_x
    if HAS_CLS:
        num_pairs = tl.where(row >= NUM_OFFSETS, WINDOW_H * WINDOW_W, num_pairs)
        num_pairs = tl.where(row == NUM_OFFSETS + 2, 1, num_pairs)

    sums = tl.zeros((BLOCK_H, BLOCK_PAIRS), acc_dtype)
    for start in range(0, num_pairs, BLOCK_PAIRS):
        pair = start + tl.arange(0, BLOCK_PAIRS)
        y = pair // pairs_x + tl.maximum(dy, 0)
        x = pair % pairs_x + tl.maximum(dx, 0)
        query = y * WINDOW_W + x + FIRST
        key = query - dy * WINDOW_W - dx
        if HAS_CLS:
            query = tl.where(row >= NUM_OFFSETS, tl.where(row == NUM_OFFSETS + 1, pair + 1, 0), query)
            key = tl.where(row >= NUM_OFFSETS, tl.where(row == NUM_OFFSETS, pair + 1, 0), key)
        grad_ptrs = grad_ptr + head.to(tl.int64)[:, None] * grad_stride_h
        grad_ptrs += (query * grad_stride_i + key * grad_stride_j)[None, :]
        mask = (head < num_heads)[:, None] & (pair < num_pairs)[None, :]
        sums += tl.load(grad_ptrs, mask=mask, other=0.0).to(acc_dtype)
    tl.store(out_ptr + row * num_heads + head, tl.sum(sums, axis=1), mask=head < num_heads)


def launch_expand(table_RH: Tensor, bias_HNN: Tensor, window: tuple[int, int], cls_token: bool) -> None:
    """Fill `bias` [H, N, N], with its padding, from `table` [R, H]. The strides of bias are (N*LD, LD, 1)."""
    num_heads, num_tokens, _ = bias_HNN.shape
    num_cols = bias_HNN.stride(1)
    grid = (
        num_tokens,
        triton.cdiv(num_cols, EXPAND_CONFIG["BLOCK_N"]),
        triton.cdiv(num_heads, EXPAND_CONFIG["BLOCK_H"]),
    )
    with on_device(table_RH.device):
        table_expand_kernel[grid](
            table_RH,
            bias_HNN,
            *table_RH.stride(),
            *bias_HNN.stride()[:2],
            num_heads,
            num_cols,
            NUM_TOKENS=num_tokens,
            WINDOW_H=window[0],
            WINDOW_W=window[1],
            HAS_CLS=cls_token,
            **EXPAND_CONFIG,
        )


def launch_scatter(grad_HNN: Tensor, out_RH: Tensor, window: tuple[int, int], cls_token: bool) -> None:
    """Fill `out` [R, H], contiguous, in fp32 or float64, with the sums of `grad` [H, N, N], of any strides."""
    num_rows, num_heads = out_RH.shape
    grid = (num_rows, triton.cdiv(num_heads, SCATTER_CONFIG["BLOCK_H"]))
    with on_device(grad_HNN.device):
        table_scatter_kernel[grid](
            grad_HNN,
            out_RH,
            *grad_HNN.stride(),
            num_heads,
            WINDOW_H=window[0],
            WINDOW_W=window[1],
            HAS_CLS=cls_token,
            **SCATTER_CONFIG,
        )
