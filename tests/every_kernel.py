"""Every Triton kernel at small, ragged shapes: what compute-sanitizer watches.

python tests/every_kernel.py masked_tokens cuda
"""

import sys

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

# Tokens and channels of a head; fp32 and wide heads have a backward of two kernels, the others one that is fused.
ATTENTION = ((50, 64), (77, 64), (77, 24), (241, 64), (77, 128))
WIDTHS = (64, 100, 1000)


def dtypes(device):
    """On a GPU the two that its matrix units know beside fp32; the interpreter's bf16 is wrong."""
    return (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float16, torch.float32)


def gather_rows(x, masked_positions, weight, bias, *, impl):
    """gather_masked without its LayerNorm."""
    return gather_masked(x, masked_positions, None, None, impl=impl)


def attend(device):
    for dtype in dtypes(device):
        for num_tokens, head_dim in ATTENTION:
            inputs = make.rel_pos_attention_inputs(2, num_tokens, 2, head_dim, dtype=dtype, device=device)
            mask = torch.zeros(2, 1, num_tokens, device=device)
            for deterministic in (True, False):

                def run(qkv, bias, mask=mask, deterministic=deterministic):
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
    for dtype in dtypes(device):
        for width in WIDTHS:
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
    for dtype in dtypes(device):
        for width in WIDTHS:
            inputs = make.residual_norm_inputs(2, 19, width, dtype=dtype, device=device)
            keep = inputs.pop("keep")
            outputs_and_grads(lambda keep=keep, **given: residual_norm(**given, keep=keep, impl="triton"), inputs)
            branch = {name: inputs[name] for name in ("x", "y", "gamma")}
            outputs_and_grads(lambda keep=keep, **given: residual_add(**given, keep=keep, impl="triton"), branch)


def token_loss_kernels(device):
    for dtype in dtypes(device):
        for num_rows, width, vocab_size in ((33, 64, 1000), (7, 100, 4099)):
            inputs = make.token_loss_inputs(num_rows, width, vocab_size, num_ignored=3, dtype=dtype, device=device)
            for reduction in ("mean", "none"):

                def run(hidden, weight, bias, targets, reduction=reduction):
                    return token_loss(
                        hidden, weight, bias, targets, impl="triton", label_smoothing=0.1, reduction=reduction
                    )

                outputs_and_grads(run, inputs)


def nearest_code_kernels(device):
    for dtype in dtypes(device):
        for num_rows, width, num_codes in ((1, 64, 1000), (77, 100, 301)):
            nearest_code(
                **make.nearest_code_inputs(num_rows, width, num_codes, dtype=dtype, device=device), impl="triton"
            )


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
