"""Allocates what the kernels fill, and launches them as the plan says.

q, k, v, out and their gradients are [B, H, N, D] with any strides but a last one of 1; bias is [H, N, N], mask
[W, 1 or N, N] in the dtype of q. B pictures, H heads, N tokens, D channels.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .._triton.descriptors import Strides, align_rows, padded_length, source, strides, tma_can_read
from .._triton.launching import on_device, product_precision
from .._triton.target import arch_of, interpreted
from ..precision import accumulate_dtype
from . import backward
from .backward import attention_bwd_kv_kernel, attention_bwd_q_kernel, bias_grad_sum_kernel
from .forward import attention_fwd_kernel
from .plan import Tile, attention_plan, keeps_exact_lse, padded_head_dim, tail

NONE, STORE, ADD, REDUCE = (mode.value for mode in (backward.NONE, backward.STORE, backward.ADD, backward.REDUCE))
"""BIAS_GRAD of the backward kernels."""

WORKSPACE_BYTES = 128 * 2**20
"""Most that the deterministic gradient of the bias keeps of grad_scores at a time, however many pictures there are.

In half precision 128 MiB hold a layer of BEiT-base at 128 pictures of 197 tokens, which then is one launch; a single
picture may take more. Any value gives the same bits: the sum always runs over the pictures from first to last.
"""


class _Call:
    """What the launches of one call share: shapes, plan, and the arguments that every kernel takes."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        *others: Tensor,
    ) -> None:
        self.batch, self.num_heads, self.num_tokens, self.head_dim = q.shape
        self.block_d = padded_head_dim(self.head_dim)
        readable = tma_can_read(q, k, v, *others)
        self.plan = attention_plan(arch_of(q.device), self.head_dim, q.dtype, tma=readable)
        self.device = q.device
        self.scale = scale
        self.bias = None if bias is None else align_rows(bias, q.dtype)[None]
        self.mask = None if mask is None else align_rows(mask, q.dtype).expand(-1, self.num_tokens, -1)[:, None]
        self.acc = tl.float64 if q.dtype is torch.float64 else tl.float32
        self.exact = keeps_exact_lse(q.dtype, masked=mask is not None)
        self.precision = product_precision(q.dtype)

    def rows(self, tensor: Tensor | None, block: int) -> object:
        """Tiles of `block` tokens of a tensor [B, H, N, D]; nothing where there is no tensor or no such tile."""
        return None if tensor is None or not block else source(tensor, block, self.block_d, self.plan.tma)

    def square(self, tensor: Tensor | None, block_rows: int, block_cols: int) -> object:
        """Tiles of a tensor [_, H, N, N]."""
        if tensor is None or not block_rows or not block_cols:
            return None
        return source(tensor, block_rows, block_cols, self.plan.tma)

    def strides(self, tensor: Tensor | None) -> Strides:
        return (0, 0, 0) if tensor is None else strides(tensor)

    def shared_arguments(self, tile: Tile) -> dict[str, Any]:
        return {
            "mask_ptr": self.mask,
            "bias_strides": self.strides(self.bias),
            "mask_strides": self.strides(self.mask),
            "scale": self.scale,
            "num_heads": self.num_heads,
            "num_masks": 1 if self.mask is None else self.mask.shape[0],
            "N": self.num_tokens,
            "D": self.head_dim,
            "BLOCK_D": self.block_d,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "HAS_BIAS": self.bias is not None,
            "HAS_MASK": self.mask is not None,
            "EXACT": self.exact,
            "TMA": self.plan.tma,
            "ACC": self.acc,
            "PRECISION": self.precision,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "enable_fp_fusion": True,
        }

    def programs(self, tile: Tile) -> tuple[int]:
        """Grid of a kernel with one program for a block of queries."""
        return (self.batch * self.num_heads * -(-self.num_tokens // tile.block_m),)

    def over_keys(self, tile: Tile, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> dict[str, Any]:
        """Arguments of a kernel that holds a block of queries and runs over the keys."""
        tail_n = tail(self.num_tokens, tile.block_n)
        return self.shared_arguments(tile) | {
            "q": self.rows(q, tile.block_m),
            "k": self.rows(k, tile.block_n),
            "v": self.rows(v, tile.block_n),
            "k_tail": self.rows(k, tail_n),
            "v_tail": self.rows(v, tail_n),
            "bias": self.square(self.bias, tile.block_m, tile.block_n),
            "bias_tail": self.square(self.bias, tile.block_m, tail_n),
            "out": self.rows(out, tile.block_m),
            "lse_ptr": lse,
            "q_strides": strides(q),
            "k_strides": strides(k),
            "v_strides": strides(v),
            "out_strides": strides(out),
            "TAIL_N": tail_n,
        }


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Fill `out` and `lse`, which is contiguous, as `triton_ops` allocates it."""
    call = _Call(q, k, v, bias, mask, scale, out)
    tile = call.plan.forward
    with on_device(call.device):
        attention_fwd_kernel[call.programs(tile)](**call.over_keys(tile, q, k, v, out, lse))


def attention_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    grad_qkv: tuple[Tensor, Tensor, Tensor] | None,
    grad_bias: Tensor | None,
    deterministic: bool,
    delta: Tensor | None = None,
) -> None:
    """Fill the gradients that are given.

    grad_bias:     [H, N, N], contiguous, of any dtype
    deterministic: sum the gradient of the bias over the pictures in a fixed order
    delta:         [B, H, N] in the dtype of lse, contiguous: filled too, where a kernel that follows reads it
    """
    call = _Call(q, k, v, bias, mask, scale, out, grad_out, *(grad_qkv or ()))
    grad_q, grad_k, grad_v = grad_qkv or (None, None, None)
    delta = lse.new_empty(q.shape[:3]) if delta is None else delta
    tile = call.plan.backward_kv
    tail_m = tail(call.num_tokens, tile.block_m)
    unordered = REDUCE if call.plan.tma and not interpreted() else ADD
    bias_grad = NONE if grad_bias is None else STORE if deterministic else unordered
    pictures_a_pass = call.batch
    if bias_grad == STORE:
        pictures_a_pass = num_pictures_a_pass(call.batch, call.num_heads, call.num_tokens, q.dtype)
    grad_scores = _grad_scores(q, bias_grad, pictures_a_pass)
    # Passes add to one another, in more digits than half precision has.
    total = grad_bias
    if grad_bias is not None and pictures_a_pass < call.batch:
        wide = accumulate_dtype(torch.promote_types(grad_bias.dtype, q.dtype))
        total = grad_bias if grad_bias.dtype == wide else grad_bias.new_empty(grad_bias.shape, dtype=wide)

    def give(block_rows: int, block_cols: int) -> object:
        """Where tiles of grad_scores go: ADD takes a pointer."""
        return grad_scores if bias_grad == ADD else call.square(grad_scores, block_rows, block_cols)

    with on_device(call.device):
        _launch_bwd_q(call, q, k, v, out, grad_out, lse, delta, grad_q)
        if grad_qkv is None and grad_bias is None:
            return
        arguments = call.shared_arguments(tile) | {
            "q": call.rows(q, tile.block_m),
            "k": call.rows(k, tile.block_n),
            "v": call.rows(v, tile.block_n),
            "q_tail": call.rows(q, tail_m),
            "bias": call.square(call.bias, tile.block_m, tile.block_n),
            "bias_tail": call.square(call.bias, tail_m, tile.block_n),
            "grad_out": call.rows(grad_out, tile.block_m),
            "grad_out_tail": call.rows(grad_out, tail_m),
            "grad_k": call.rows(grad_k, tile.block_n),
            "grad_v": call.rows(grad_v, tile.block_n),
            "grad_scores": give(tile.block_n, tile.block_m),
            "grad_scores_tail": give(tile.block_n, tail_m),
            "lse_ptr": lse,
            "delta_ptr": delta,
            "q_strides": strides(q),
            "k_strides": strides(k),
            "v_strides": strides(v),
            "grad_out_strides": strides(grad_out),
            "grad_k_strides": call.strides(grad_k),
            "grad_v_strides": call.strides(grad_v),
            "grad_scores_strides": call.strides(grad_scores),
            "TAIL_M": tail_m,
            "WANT_QKV": grad_qkv is not None,
            "BIAS_GRAD": bias_grad,
        }
        programs_a_picture = call.num_heads * -(-call.num_tokens // tile.block_n)
        for first in range(0, call.batch, pictures_a_pass):
            num_pictures = min(pictures_a_pass, call.batch - first)
            attention_bwd_kv_kernel[(num_pictures * programs_a_picture,)](first_picture=first, **arguments)
            if total is not None and grad_scores is not None:
                num_slots = num_pictures if bias_grad == STORE else 1
                _launch_bias_grad_sum(call, grad_scores, total, num_slots, first > 0)
        if grad_bias is not None and total is not None and total is not grad_bias:
            grad_bias.copy_(total)


def num_pictures_a_pass(batch: int, num_heads: int, num_tokens: int, dtype: torch.dtype) -> int:
    """Pictures whose grad_scores WORKSPACE_BYTES can hold: one at least."""
    return max(1, min(batch, WORKSPACE_BYTES // bytes_a_picture(num_heads, num_tokens, dtype)))


def bytes_a_picture(num_heads: int, num_tokens: int, dtype: torch.dtype) -> int:
    """Room that the grad_scores of one picture take."""
    return num_heads * num_tokens * padded_length(num_tokens) * dtype.itemsize


def _grad_scores(q: Tensor, bias_grad: int, pictures_a_pass: int) -> Tensor | None:
    """Room for what a kernel gives of grad_scores, [C, H, N, N] with keys as rows."""
    _, num_heads, num_tokens, _ = q.shape
    if bias_grad == NONE:
        return None
    row_length = padded_length(num_tokens)
    if bias_grad in (ADD, REDUCE):
        dtype = accumulate_dtype(q.dtype)
        return q.new_zeros(1, num_heads, num_tokens, row_length, dtype=dtype)[..., :num_tokens]
    return q.new_empty(pictures_a_pass, num_heads, num_tokens, row_length)[..., :num_tokens]


def _launch_bwd_q(
    call: _Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_q: Tensor | None,
) -> None:
    tile = call.plan.backward_q
    attention_bwd_q_kernel[call.programs(tile)](
        grad_out=call.rows(grad_out, tile.block_m),
        grad_q=call.rows(grad_q, tile.block_m),
        delta_ptr=delta,
        grad_out_strides=strides(grad_out),
        grad_q_strides=call.strides(grad_q),
        WANT_QKV=grad_q is not None,
        **call.over_keys(tile, q, k, v, out, lse),
    )


def _launch_bias_grad_sum(call: _Call, grad_scores: Tensor, grad_bias: Tensor, num_pictures: int, add_to: bool) -> None:
    block_m, block_n = 64, 32
    blocks = -(-call.num_tokens // block_m) * -(-call.num_tokens // block_n)
    bias_grad_sum_kernel[(call.num_heads * blocks,)](
        grad_scores,
        grad_bias,
        strides(grad_scores),
        num_pictures,
        N=call.num_tokens,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        ADD_TO=add_to,
        ACC=call.acc,
        num_warps=4,
        enable_fp_fusion=True,
    )
