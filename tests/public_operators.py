"""One small call of every public operator, for what must hold of all of them."""

import torch

from fused_beit.kernels import (
    attention,
    embed_tokens,
    expand_table,
    gather_masked,
    keep_visible,
    nearest_code,
    rel_pos_attention,
    residual_add,
    residual_norm,
    restore_tokens,
    scatter_table,
    token_loss,
)
from fused_beit.kernels import testing as make

WINDOW = (1, 2)  # 3 tokens with CLS, 6 rows of a table


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _apart(qkv, bias):
    return dict(zip("qkv", qkv.permute(2, 0, 3, 1, 4).contiguous(), strict=True)) | {"bias": bias}


def _branch(weight, bias, **inputs):
    return inputs


CALLS = {
    "attention": (attention, _apart(**make.rel_pos_attention_inputs(2, 5, 2, 8))),
    "embed_tokens": (embed_tokens, make.embed_tokens_inputs(2, 4, 8, 2, num_padding=1)),
    "expand_table": (expand_table, {"table": numbers(6, 2), "window": WINDOW}),
    "gather_masked": (gather_masked, make.gather_masked_inputs(2, 5, 8, 2, num_padding=1)),
    "keep_visible": (keep_visible, make.keep_visible_inputs(2, 4, 8, 2)),
    "nearest_code": (nearest_code, make.nearest_code_inputs(5, 4, 6)),
    "rel_pos_attention": (rel_pos_attention, make.rel_pos_attention_inputs(2, 5, 2, 8)),
    "residual_add": (residual_add, _branch(**make.residual_norm_inputs(2, 3, 8))),
    "residual_norm": (residual_norm, make.residual_norm_inputs(2, 3, 8)),
    "restore_tokens": (restore_tokens, make.restore_tokens_inputs(2, 4, 8, 2) | {"num_patches": 4}),
    "scatter_table": (scatter_table, {"grad": numbers(2, 3, 3), "window": WINDOW}),
    "token_loss": (token_loss, make.token_loss_inputs(6, 8, 5, num_ignored=2)),
}
"""Name -> the function, and its arguments by name: tensors first."""


def call(name, impl, **change):
    """The result of an operator, always a tuple of tensors."""
    function, arguments = CALLS[name]
    result = function(**arguments | change, impl=impl)
    return result if isinstance(result, tuple) else (result,)
