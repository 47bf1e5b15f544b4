"""Tokens put in their places: the kernels of embed_tokens, keep_visible and restore_tokens, which are one.

Each moves rows between a full side, CLS and P patches, and a side that may lack patches, and adds what a row gets:

    PLACE       a row of the output is                                                              + position of
    "embed"     CLS; the mask token where `positions` has the patch; else the patch                 that row
    "keep"      CLS; the patch that `positions` has in this slot; zeros for an empty slot           that patch, or none
    "restore"   row 0 of the input; row 1 + slot where `positions` has the patch; else the mask token   that row

The backward goes over the tokens of the full side, and in each over the pictures, whose gradients it sums: that is the
gradient of the positions, its row 0 that of CLS, and over the rows of mask tokens that of the mask token.

B pictures, P patches, N = P+1 tokens, M slots in `positions` int64 [B, M], D channels. Rows are cut as in
_triton/rows.py.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel have the types that Triton finds at its launch.

import triton
import triton.language as tl

from .._triton.rows import load_channels, load_rows, store_partial, store_rows, sum_partials
from .slots import find_slots


@triton.jit
def place_piece(
    source_ptr,
    cls_ptr,
    mask_ptr,
    pos_ptr,
    out_ptr,
    rows,
    inside,
    source_rows,
    has_source,
    is_cls,
    is_hidden,
    pos_rows,
    has_pos,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
):
    values = load_rows(source_ptr, source_rows, has_source, FIRST, SIZE, D, ACC)
    if cls_ptr is not None:
        values = tl.where(is_cls[:, None], load_channels(cls_ptr, FIRST, SIZE, D, ACC)[None, :], values)
    if mask_ptr is not None:
        values = tl.where(is_hidden[:, None], load_channels(mask_ptr, FIRST, SIZE, D, ACC)[None, :], values)
    if pos_ptr is not None:
        values += load_rows(pos_ptr, pos_rows, has_pos, FIRST, SIZE, D, ACC)
    store_rows(out_ptr, rows, inside, values, FIRST, SIZE, D)


@triton.jit(do_not_specialize=["num_rows", "num_patches", "num_slots"])
def place_fwd_kernel(
    source_ptr,  # patches [B, P, D]; to restore, tokens [B, M+1, D]
    cls_ptr,  # [D]; None to restore
    mask_ptr,  # [D]; None to keep
    pos_ptr,  # [P+1, D] or None
    positions_ptr,  # int64 [B, M], or None to embed what is not masked
    out_ptr,  # [B, P+1, D]; to keep, [B, M+1, D]
    num_rows,  # of the output
    num_patches,
    num_slots,
    PLACE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for ROWS rows of the output."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    if PLACE == "keep":
        pictures, tokens = rows // (num_slots + 1), rows % (num_slots + 1)
        slot_ptrs = positions_ptr + pictures.to(tl.int64) * num_slots + tokens - 1
        patches = tl.load(slot_ptrs, mask=inside & (tokens > 0), other=-1).to(tl.int32)
        is_cls = tokens == 0
        is_hidden = tokens < 0  # there are no mask tokens here
        has_source = (patches >= 0) & (patches < num_patches)
        source_rows = pictures * num_patches + patches
        pos_rows = tl.where(is_cls, 0, patches + 1)
        has_pos = inside & (is_cls | has_source)
    else:
        pictures, tokens = rows // (num_patches + 1), rows % (num_patches + 1)
        slots = find_slots(positions_ptr, pictures, tokens - 1, inside, num_slots, CHUNK, CHUNKS)
        is_cls = tokens == 0
        pos_rows, has_pos = tokens, inside
        if PLACE == "embed":
            is_hidden = slots >= 0
            has_source = inside & (tokens > 0) & (slots < 0)
            source_rows = pictures * num_patches + tokens - 1
        else:
            is_hidden = (tokens > 0) & (slots < 0)
            has_source = inside & ((tokens == 0) | (slots >= 0))
            source_rows = pictures * (num_slots + 1) + slots + 1
    place_piece(
        source_ptr, cls_ptr, mask_ptr, pos_ptr, out_ptr, rows, inside, source_rows, has_source, is_cls, is_hidden,
        pos_rows, has_pos, 0, MAIN, D, ACC,
    )  # fmt: skip
    if TAIL:
        place_piece(
            source_ptr, cls_ptr, mask_ptr, pos_ptr, out_ptr, rows, inside, source_rows, has_source, is_cls, is_hidden,
            pos_rows, has_pos, MAIN, TAIL, D, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_pictures", "num_patches", "num_slots", "num_sums", "pictures_a_program"])
def place_bwd_kernel(
    grad_ptr,  # of the output
    positions_ptr,  # int64 [B, M] or None
    grad_source_ptr,  # as the source of the forward, or None
    token_sums_ptr,  # [groups, num_sums, D] or None
    mask_sums_ptr,  # [programs, D] or None
    num_pictures,
    num_patches,
    num_slots,
    num_sums,  # tokens whose gradient is summed: all, or CLS alone
    pictures_a_program,
    PLACE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for ROWS tokens of the full side, in one group of pictures, one after another."""
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tokens <= num_patches
    is_cls = tokens == 0
    token_sums_main = tl.zeros((ROWS, MAIN), ACC)
    mask_sums_main = tl.zeros((ROWS, MAIN), ACC)
    if TAIL:
        token_sums_tail = tl.zeros((ROWS, TAIL), ACC)
        mask_sums_tail = tl.zeros((ROWS, TAIL), ACC)

    begin = tl.program_id(1) * pictures_a_program
    end = tl.minimum(begin + pictures_a_program, num_pictures)
    for picture in tl.range(begin, end, num_stages=STAGES):
        slots = find_slots(
            positions_ptr, tl.full(tokens.shape, picture, tl.int32), tokens - 1, inside, num_slots, CHUNK, CHUNKS
        )
        grad_rows = picture * (num_patches + 1) + tokens
        has_grad = inside
        source_rows = picture * num_patches + tokens - 1
        has_source = inside & (tokens > 0)
        if PLACE == "embed":
            is_hidden = slots >= 0
        elif PLACE == "keep":
            is_hidden = tokens < 0  # there are no mask tokens here
            grad_rows = picture * (num_slots + 1) + slots + 1
            has_grad = inside & (is_cls | (slots >= 0))
        else:
            is_hidden = (tokens > 0) & (slots < 0)
            source_rows = picture * (num_slots + 1) + slots + 1
            has_source = inside & ((tokens == 0) | (slots >= 0))

        grad_main = load_rows(grad_ptr, grad_rows, has_grad, 0, MAIN, D, ACC)
        token_sums_main += grad_main
        mask_sums_main += tl.where(is_hidden[:, None], grad_main, 0.0)
        if grad_source_ptr is not None:
            visible_main = tl.where(is_hidden[:, None], 0.0, grad_main)
            store_rows(grad_source_ptr, source_rows, has_source, visible_main, 0, MAIN, D)
        if TAIL:
            grad_tail = load_rows(grad_ptr, grad_rows, has_grad, MAIN, TAIL, D, ACC)
            token_sums_tail += grad_tail
            mask_sums_tail += tl.where(is_hidden[:, None], grad_tail, 0.0)
            if grad_source_ptr is not None:
                visible_tail = tl.where(is_hidden[:, None], 0.0, grad_tail)
                store_rows(grad_source_ptr, source_rows, has_source, visible_tail, MAIN, TAIL, D)

    if token_sums_ptr is not None:
        sum_rows = tl.program_id(1) * num_sums + tokens
        store_rows(token_sums_ptr, sum_rows, tokens < num_sums, token_sums_main, 0, MAIN, D)
        if TAIL:
            store_rows(token_sums_ptr, sum_rows, tokens < num_sums, token_sums_tail, MAIN, TAIL, D)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    store_partial(mask_sums_ptr, program, mask_sums_main, 0, MAIN, D)
    if TAIL:
        store_partial(mask_sums_ptr, program, mask_sums_tail, MAIN, TAIL, D)


@triton.jit(do_not_specialize=["num_groups", "num_programs", "num_columns"])
def place_sums_kernel(
    token_sums_ptr,  # [groups, columns] or None
    mask_sums_ptr,  # [programs, D] or None
    grad_tokens_ptr,  # [columns]: those of the tokens, one after another
    grad_mask_ptr,  # [D]
    num_groups,
    num_programs,
    num_columns,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program for COLS columns of one of the two sums."""
    if tl.program_id(1) == 0:
        sum_partials(mask_sums_ptr, grad_mask_ptr, num_programs, D, ROWS, COLS)
    else:
        sum_partials(token_sums_ptr, grad_tokens_ptr, num_groups, num_columns, 1, COLS)
