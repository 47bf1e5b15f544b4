"""Every Triton kernel at small, ragged shapes: what compute-sanitizer watches, under which all is many times slower.

So each path of a kernel is run once: each family, each dtype that has its own, with what is optional and without.

python tests/every_kernel.py masked_tokens cuda
"""

import sys
from typing import NamedTuple

import torch

from fused_beit.kernels import (
    RelativePositionBias,
    embed_tokens,
    gather_masked,
    keep_visible,
    nearest_code,
    rel_pos_attention,
    residual_add,
    residual_norm,
    restore_tokens,
    token_loss,
)
from fused_beit.kernels import testing as make
from fused_beit.kernels.testing import outputs_and_grads


class Attention(NamedTuple):
    """One shape of attention, in half precision or fp32."""

    num_tokens: int
    head_dim: int
    half: bool = True
    masked: bool = False
    aligned: bool = True
    """Whether descriptors can be made of q, k and v; where they cannot, the kernels take pointers."""


ATTENTION = (
    Attention(77, 64),
    Attention(77, 24),
    Attention(77, 64, masked=True),
    Attention(50, 128),
    Attention(50, 24, aligned=False),
    Attention(50, 64, half=False),
    Attention(50, 128, half=False, masked=True),
)


def half(device):
    """The interpreter's bf16 is wrong."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def widths(device):
    """A width that is cut in two, ragged, and one that is a power of two."""
    return (half(device), 100), (torch.float32, 64)


def gather_rows(x, masked_positions, weight, bias, *, impl):
    """gather_masked without its LayerNorm."""
    return gather_masked(x, masked_positions, None, None, impl=impl)


def attend(device):
    for case in ATTENTION:
        dtype = half(device) if case.half else torch.float32
        # A channel that is left out makes strides that no descriptor takes.
        channels = case.head_dim + (not case.aligned)
        inputs = make.rel_pos_attention_inputs(2, case.num_tokens, 2, channels, dtype=dtype, device=device)
        mask = torch.zeros(2, 1, case.num_tokens, device=device) if case.masked else None
        for deterministic in (True, False):

            def run(qkv, bias, case=case, mask=mask, deterministic=deterministic):
                qkv = qkv[..., -case.head_dim :]
                return rel_pos_attention(qkv, bias, mask=mask, deterministic=deterministic, impl="triton")

            outputs_and_grads(run, inputs)


def bias_from_table(device):
    for window in ((3, 5), (7, 7)):
        table = RelativePositionBias(window, 3, impl="triton").to(device)
        table().sum().backward()


def rel_pos_attention_kernels(device):
    attend(device)
    bias_from_table(device)


def masked_tokens_kernels(device):
    for dtype, width in widths(device):
        sizes = {"num_padding": 3, "dtype": dtype, "device": device}
        for operator, inputs, options in (
            (embed_tokens, make.embed_tokens_inputs(2, 19, width, 8, **sizes), {}),
            (keep_visible, make.keep_visible_inputs(2, 19, width, 8, **sizes), {}),
            (restore_tokens, make.restore_tokens_inputs(2, 19, width, 8, **sizes), {"num_patches": 19}),
            (gather_masked, make.gather_masked_inputs(2, 20, width, 8, **sizes), {}),
            (gather_rows, make.gather_masked_inputs(2, 20, width, 8, **sizes), {}),
        ):

            def run(operator=operator, options=options, **given):
                return operator(**given, **options, impl="triton")

            outputs_and_grads(run, inputs)


def residual_norm_kernels(device):
    for dtype, width in widths(device):
        inputs = make.residual_norm_inputs(2, 19, width, dtype=dtype, device=device)
        keep = inputs.pop("keep")
        outputs_and_grads(lambda keep=keep, **given: residual_norm(**given, keep=keep, impl="triton"), inputs)
        branch = {name: inputs[name] for name in ("x", "y", "gamma")}
        outputs_and_grads(lambda keep=keep, **given: residual_add(**given, keep=keep, impl="triton"), branch)


def token_loss_kernels(device):
    for (dtype, width), num_rows, vocab_size in zip(widths(device), (7, 33), (4099, 1000), strict=True):
        inputs = make.token_loss_inputs(num_rows, width, vocab_size, num_ignored=3, dtype=dtype, device=device)
        for reduction in ("mean", "none"):

            def run(hidden, weight, bias, targets, reduction=reduction):
                return token_loss(
                    hidden, weight, bias, targets, impl="triton", label_smoothing=0.1, reduction=reduction
                )

            outputs_and_grads(run, inputs)


def nearest_code_kernels(device):
    for (dtype, width), num_rows, num_codes in zip(widths(device), (77, 1), (301, 1000), strict=True):
        nearest_code(**make.nearest_code_inputs(num_rows, width, num_codes, dtype=dtype, device=device), impl="triton")


PACKAGES = {
    "rel_pos_attention": rel_pos_attention_kernels,
    "masked_tokens": masked_tokens_kernels,
    "residual_norm": residual_norm_kernels,
    "token_loss": token_loss_kernels,
    "nearest_code": nearest_code_kernels,
}
"""Of `fused_beit.kernels`, and what runs their kernels on a device."""

if __name__ == "__main__":
    package, device = sys.argv[1:]
    PACKAGES[package](device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"done: {package}")
