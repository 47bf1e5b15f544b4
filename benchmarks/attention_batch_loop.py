"""A peer's scheme of the gradient of the bias: a kernel of its own that loops over the pictures and writes no dS.

Nothing of [B, H, N, N] is in memory and the sum has a fixed order, as TriFast does it; in return S and dP are computed
once more, nine products where five would do. The kernel is written here from that scheme; forward and the gradients of
q, k and v are our own kernels', so that what is compared is the way to the gradient of the bias alone.

B pictures, H heads, N tokens, D channels of a head.
"""

# mypy: disable-error-code=no-untyped-def

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_beit.kernels import attention_plan
from fused_beit.kernels._triton.descriptors import align_rows, source, strides, tma_can_read
from fused_beit.kernels._triton.launching import on_device, product_precision
from fused_beit.kernels._triton.target import arch_of
from fused_beit.kernels._triton.tiles import load_tile, padded, store_tile
from fused_beit.kernels.precision import accumulate_dtype
from fused_beit.kernels.rel_pos_attention.launch import attention_bwd, attention_fwd
from fused_beit.kernels.rel_pos_attention.plan import Tile, keeps_exact_lse, padded_head_dim
from fused_beit.kernels.rel_pos_attention.scores import load_lse, probabilities

HALF = Tile(64, 32, 4, 3)
"""197 tokens with 12 heads make 336 programs, which the 132 multiprocessors of an H100 hold at once, at most 3 on each.
64 keys would make 192, whose longest multiprocessors work for a third longer. No other tile was timed."""
WIDE = Tile(32, 32, 4, 1)
"""In fp32."""


def tile_for(dtype: torch.dtype) -> Tile:
    return HALF if dtype.itemsize == 2 else WIDE


@triton.jit
def bias_grad_kernel(
    q,  # [B, H, N, D]; a descriptor under TMA, else a pointer, like the five below
    k,
    v,
    bias,  # [1, H, N, N]
    grad_out,  # [B, H, N, D]
    grad_bias,  # [1, H, N, N], a pointer
    lse_ptr,  # [B, H, N], contiguous, like delta; [B, H, N, 2] where EXACT
    delta_ptr,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    grad_out_strides,
    grad_bias_strides,
    scale,
    num_pictures,
    num_heads,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for a tile of one head's bias: the sum of its dS over the pictures, from first to last."""
    NUM_BLOCKS_M: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    NUM_BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    h = tl.program_id(0) // (NUM_BLOCKS_M * NUM_BLOCKS_N)
    start_m = tl.program_id(0) // NUM_BLOCKS_N % NUM_BLOCKS_M * BLOCK_M
    start_n = tl.program_id(0) % NUM_BLOCKS_N * BLOCK_N
    offs_m = start_m + tl.arange(0, BLOCK_M)
    is_key = start_n + tl.arange(0, BLOCK_N) < N

    bias_tile = load_tile(bias, bias_strides, 0, h, start_m, start_n, N, padded(N), BLOCK_M, BLOCK_N, TMA)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for b in tl.range(0, num_pictures):
        q_tile = load_tile(q, q_strides, b, h, start_m, 0, N, D, BLOCK_M, BLOCK_D, TMA)
        k_tile = load_tile(k, k_strides, b, h, start_n, 0, N, D, BLOCK_N, BLOCK_D, TMA)
        v_tile = load_tile(v, v_strides, b, h, start_n, 0, N, D, BLOCK_N, BLOCK_D, TMA)
        grad_tile = load_tile(grad_out, grad_out_strides, b, h, start_m, 0, N, D, BLOCK_M, BLOCK_D, TMA)
        rows = tl.cast(b * num_heads + h, tl.int64) * N + offs_m
        shift, factor = load_lse(lse_ptr, rows, offs_m < N, EXACT)
        delta = tl.load(delta_ptr + rows, mask=offs_m < N, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC) * scale
        scores = tl.where(is_key[None, :], scores + bias_tile.to(ACC), float("-inf"))
        weights = probabilities(scores, shift[:, None], factor[:, None], EXACT)
        grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC)
        total += weights * (grad_weights - delta[:, None])
    store_tile(grad_bias, grad_bias_strides, 0, h, start_m, start_n, total, N, N, BLOCK_M, BLOCK_N, False)


def bias_grad(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_bias: Tensor
) -> None:
    """Fill `grad_bias` [H, N, N]. q, k, v and grad_out are [B, H, N, D], bias [H, N, N], delta [B, H, N]; lse is as
    `attention_fwd` leaves it."""
    batch, num_heads, num_tokens, head_dim = q.shape
    arch = arch_of(q.device)
    tma = attention_plan(arch, head_dim, q.dtype, tma=tma_can_read(q, k, v, grad_out)).tma
    tile = tile_for(q.dtype)
    block_d = padded_head_dim(head_dim)
    aligned = align_rows(bias, q.dtype)[None]
    rows = partial(source, cols=block_d, tma=tma)
    blocks = -(-num_tokens // tile.block_m) * -(-num_tokens // tile.block_n)
    with on_device(q.device):
        bias_grad_kernel[(num_heads * blocks,)](
            rows(q, tile.block_m),
            rows(k, tile.block_n),
            rows(v, tile.block_n),
            source(aligned, tile.block_m, tile.block_n, tma),
            rows(grad_out, tile.block_m),
            grad_bias[None],
            lse,
            delta,
            strides(q),
            strides(k),
            strides(v),
            strides(aligned),
            strides(grad_out),
            strides(grad_bias[None]),
            q.shape[-1] ** -0.5,
            batch,
            num_heads,
            N=num_tokens,
            D=head_dim,
            BLOCK_D=block_d,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            EXACT=keeps_exact_lse(q.dtype, masked=False),
            TMA=tma,
            ACC=tl.float64 if q.dtype is torch.float64 else tl.float32,
            PRECISION=product_precision(q.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )


class Attend(torch.autograd.Function):
    """qkv [B, N, 3, H, D], bias [H, N, N] -> [B, N, H, D]"""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = parts(qkv)
        batch, num_heads, num_tokens, head_dim = q.shape
        out = qkv.new_empty(batch, num_tokens, num_heads, head_dim)
        pair = (2,) if keeps_exact_lse(qkv.dtype, masked=False) else ()
        lse = qkv.new_empty(batch, num_heads, num_tokens, *pair, dtype=accumulate_dtype(qkv.dtype))
        attention_fwd(q, k, v, bias, None, head_dim**-0.5, out.transpose(1, 2), lse)
        ctx.save_for_backward(qkv, bias, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        qkv, bias, out, lse = ctx.saved_tensors
        q, k, v = parts(qkv)
        grad_qkv, grad_bias = torch.empty_like(qkv), bias.new_empty(bias.shape)
        grad_out, out = grad_out.contiguous().transpose(1, 2), out.transpose(1, 2)
        delta = lse.new_empty(q.shape[:3])
        attention_bwd(
            grad_out,
            q,
            k,
            v,
            bias,
            None,
            out,
            lse,
            q.shape[-1] ** -0.5,
            grad_qkv=parts(grad_qkv),
            grad_bias=None,
            deterministic=True,
            delta=delta,
        )
        bias_grad(q, k, v, bias, grad_out, lse, delta, grad_bias)
        return grad_qkv, grad_bias


def parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, D], views of qkv [B, N, 3, H, D]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attend(qkv: Tensor, bias: Tensor) -> Tensor:
    """[B, N, 3, H, D], [H, N, N] -> [B, N, H*D]"""
    return Attend.apply(qkv, bias).flatten(2)
