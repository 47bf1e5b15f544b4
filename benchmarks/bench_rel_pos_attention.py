"""Attention with the relative position bias, forward and backward: the implementations against each other."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fused_beit.kernels import rel_pos_attention
from fused_beit.kernels.testing import assert_parity, rel_pos_attention_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"smoke": (2, 17, 2, 8), "full": (8, 197, 12, 64)}  # B, N, H, D
REFERENCE = partial(rel_pos_attention, impl="reference")
PROVIDERS = {"reference": REFERENCE, "sdpa": partial(rel_pos_attention, impl="sdpa")}


def forward_backward(attention: Callable[[Tensor, Tensor], Tensor], qkv: Tensor, bias: Tensor) -> Callable[[], None]:
    """Output and the gradients of qkv and bias."""
    qkv, bias = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
    grad_out = torch.randn_like(attention(qkv, bias))

    def run() -> None:
        torch.autograd.grad(attention(qkv, bias), (qkv, bias), grad_out)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rel_pos_attention(in_turn, sizes, dtype):
    size = SIZES[sizes]
    inputs = rel_pos_attention_inputs(*size, dtype=dtype, device=DEVICE)
    for attention in PROVIDERS.values():
        assert_parity(attention, REFERENCE, inputs)
    runs = {name: forward_backward(attention, **inputs) for name, attention in PROVIDERS.items()}
    shape = ", ".join(f"{name} {count}" for name, count in zip("BNHD", size, strict=True))
    in_turn(f"attention, {shape}, {str(dtype).removeprefix('torch.')}", runs)
