"""Launches the kernels, with tiles pinned by width and programs by architecture. What is filled is contiguous.

B pictures, P patches, M slots for positions, D channels.
"""

from torch import Tensor

from .._triton.launching import on_device
from .._triton.rows import Cut, cdiv, cut, num_programs, row_arguments, rows_a_program
from .._triton.target import arch_of
from ..precision import accumulate_dtype
from .gather import gather_bwd_kernel, gather_fwd_kernel, gather_sums_kernel
from .place import place_bwd_kernel, place_fwd_kernel, place_sums_kernel

# Chosen from what Triton 3.9.0 compiles them to (`make kernel-report`), not timed on a GPU yet; README.md says how.
TILE = 2048
"""Most numbers of each tensor that a program holds at a time, counting a width as the next power of two."""
COMPARED = 128
"""Most pairs of a row and a slot that are compared at a time."""
COMPARED_IN_ALL = 1024
"""Most such pairs of a tile where its rows can be fewer: each takes 16 bytes of shared memory in a backward."""
FORWARD_WARPS = 1
BACKWARD_WARPS = 4
STAGES = 3

SUM_ROWS = 64
"""Partial sums that are added at a time."""
SUM_CONFIG = {"COLS": 32, "num_warps": 4, "enable_fp_fusion": True}


def _cut(width: int, num_slots: int) -> Cut:
    """How a row is cut whose place is looked up among so many slots."""
    rows = cut(width, TILE)
    most = 1 << max(0, (COMPARED_IN_ALL // max(1, num_slots)).bit_length() - 1)
    return rows._replace(rows=min(rows.rows, most))


def _slot_arguments(num_slots: int, rows: Cut) -> dict[str, int]:
    chunk = min(1 << (max(1, num_slots) - 1).bit_length(), max(1, COMPARED // rows.rows))
    return {"CHUNK": chunk, "CHUNKS": cdiv(num_slots, chunk)}


def _partials(out: Tensor | None, *shape: int) -> Tensor | None:
    return None if out is None else out.new_empty(shape, dtype=accumulate_dtype(out.dtype))


def place_fwd(
    place: str,
    source: Tensor,
    cls_token: Tensor | None,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
    positions: Tensor | None,
    num_patches: int,
    out: Tensor,
) -> None:
    """Fill out [B, P+1, D], or [B, M+1, D] where place is "keep"."""
    num_rows, width = out.shape[0] * out.shape[1], out.shape[2]
    num_slots = 0 if positions is None else positions.shape[1]
    rows = _cut(width, num_slots)
    inputs = [
        None if tensor is None else tensor.contiguous()
        for tensor in (source, cls_token, mask_token, pos_embed, positions)
    ]
    with on_device(out.device):
        place_fwd_kernel[(cdiv(num_rows, rows.rows),)](
            *inputs,
            out,
            num_rows,
            num_patches,
            num_slots,
            PLACE=place,
            **_slot_arguments(num_slots, rows),
            **row_arguments(width, rows, out.dtype, FORWARD_WARPS),
        )


def place_bwd(
    place: str,
    grad: Tensor,
    positions: Tensor | None,
    num_patches: int,
    grad_source: Tensor | None,
    grad_mask_token: Tensor | None,
    grad_tokens: Tensor | None,
) -> None:
    """Fill the gradients that are given.

    grad_tokens: [T, D], summed over the pictures: T = P+1 for those of all positions, T = 1 for that of CLS
    """
    num_pictures, width = grad.shape[0], grad.shape[2]
    num_slots = 0 if positions is None else positions.shape[1]
    rows = _cut(width, num_slots)
    num_tiles = cdiv(num_patches + 1, rows.rows)
    num_groups = min(num_pictures, cdiv(num_programs(arch_of(grad.device)), num_tiles))
    pictures_each = cdiv(num_pictures, num_groups)
    num_groups = cdiv(num_pictures, pictures_each)
    num_sums = 0 if grad_tokens is None else grad_tokens.shape[0]
    token_sums = _partials(grad_tokens, num_groups, num_sums, width)
    mask_sums = _partials(grad_mask_token, num_groups * num_tiles, width)
    with on_device(grad.device):
        place_bwd_kernel[(num_tiles, num_groups)](
            grad.contiguous(),
            None if positions is None else positions.contiguous(),
            grad_source,
            token_sums,
            mask_sums,
            num_pictures,
            num_patches,
            num_slots,
            num_sums,
            pictures_each,
            PLACE=place,
            STAGES=STAGES,
            **_slot_arguments(num_slots, rows),
            **row_arguments(width, rows, grad.dtype, BACKWARD_WARPS),
        )
        if token_sums is not None or mask_sums is not None:
            num_columns = max(width, num_sums * width)
            place_sums_kernel[(cdiv(num_columns, SUM_CONFIG["COLS"]), 2)](
                token_sums,
                mask_sums,
                grad_tokens,
                grad_mask_token,
                num_groups,
                num_groups * num_tiles,
                num_columns,
                D=width,
                ROWS=SUM_ROWS,
                **SUM_CONFIG,
            )


def gather_fwd(
    x: Tensor,
    positions: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_prefix_tokens: int,
    out: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Fill out [B*M, D] and mean, rstd [B*M], which are None without weight and bias."""
    rows = cut(x.shape[2], TILE)
    with on_device(x.device):
        gather_fwd_kernel[(cdiv(positions.numel(), rows.rows),)](
            x.contiguous(),
            positions.contiguous(),
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            mean,
            rstd,
            positions.numel(),
            x.shape[1],
            positions.shape[1],
            num_prefix_tokens,
            EPS=eps,
            **row_arguments(x.shape[2], rows, x.dtype, FORWARD_WARPS),
        )


def gather_bwd(
    grad: Tensor,
    x: Tensor | None,
    positions: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    num_prefix_tokens: int,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Fill the gradients that are given; without x, weight, mean and rstd that of x is all there is."""
    like = grad_x if x is None else x
    assert like is not None
    num_tokens, width = like.shape[1:]
    num_rows, num_slots = like.shape[0] * num_tokens, positions.shape[1]
    rows = _cut(width, num_slots)
    rows_each = rows_a_program(num_rows, rows, arch_of(like.device))
    num_partials = cdiv(num_rows, rows_each)
    weight_sums, bias_sums = (_partials(out, num_partials, width) for out in (grad_weight, grad_bias))
    with on_device(like.device):
        gather_bwd_kernel[(num_partials,)](
            grad.contiguous(),
            None if x is None else x.contiguous(),
            positions.contiguous(),
            None if weight is None else weight.contiguous(),
            mean,
            rstd,
            grad_x,
            weight_sums,
            bias_sums,
            num_rows,
            num_tokens,
            num_slots,
            num_prefix_tokens,
            rows_each,
            STAGES=STAGES,
            **_slot_arguments(num_slots, rows),
            **row_arguments(width, rows, like.dtype, BACKWARD_WARPS),
        )
        if weight_sums is not None or bias_sums is not None:
            gather_sums_kernel[(cdiv(width, SUM_CONFIG["COLS"]), 2)](
                weight_sums, bias_sums, grad_weight, grad_bias, num_partials, D=width, ROWS=SUM_ROWS, **SUM_CONFIG
            )
