"""Attention on a GPU by torch's own kernels and by ours, where torch's had faults: pytorch issues 196678 and 148476."""

import pytest
import torch

from fused_beit.kernels import attention, rel_pos_attention
from fused_beit.kernels.testing import assert_no_worse_than_eager, rel_pos_attention_inputs

pytestmark = pytest.mark.gpu

# A name, so that a dry run in the interpreter can set another.
DEVICE = "cuda"
IMPLS = ["auto", "sdpa", "triton"]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def scores_below(logsumexp, num_tokens, dtype):
    """q, k, v whose scores are all near a number, and a bias that learns nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = 0.1 * torch.randn(3, 2, 2, num_tokens, 64, generator=generator)
    q[..., 0], k[..., 0] = 1, logsumexp * 64**0.5
    bias = torch.randn(2, num_tokens, num_tokens, generator=generator)
    return [tensor.to(DEVICE, dtype) for tensor in (q, k, 10 * v, bias)]


def gradients(impl, q, k, v, bias, mask):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
    out = attention(*leaves, bias, mask=mask, impl=impl)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return torch.autograd.grad(out, leaves, cotangent)


@HALF
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("added", ["bias", "mask", "both"])
@pytest.mark.parametrize("num_tokens", [64, 192, 65, 128])
def test_gradients_of_very_negative_scores_beside_a_frozen_bias_are_finite_and_right(num_tokens, added, impl, dtype):
    q, k, v, bias = scores_below(-120, num_tokens, dtype)
    mask = torch.ones(2, 1, num_tokens, dtype=torch.bool, device=DEVICE) if added != "bias" else None
    bias = None if added == "mask" else bias
    exact = gradients("reference", *(x if x is None else x.double() for x in (q, k, v, bias)), mask)
    eager, found = (gradients(which, q, k, v, bias, mask) for which in ("reference", impl))
    for name, *three in zip("qkv", found, eager, exact, strict=True):
        assert three[0].isfinite().all(), f"grad {name}"
        # Of the first channel of q the gradient is 960 times a sum that is 0: roundings alone, as chance has them.
        first = 1 if name == "q" else 0
        assert_no_worse_than_eager(f"grad {name}", *(tensor[..., first:].cpu() for tensor in three))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_tokens", [64, 197])
def test_a_bias_may_be_all_that_learns(num_tokens, impl, dtype):
    inputs = rel_pos_attention_inputs(2, num_tokens, 2, 64, dtype=dtype, device=DEVICE)
    grads = []
    for which, wide in ((impl, dtype), ("reference", dtype), ("reference", torch.float64)):
        bias = inputs["bias"].detach().to(wide).requires_grad_()
        out = rel_pos_attention(inputs["qkv"].to(wide), bias, impl=which)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, wide)
        grads.append(torch.autograd.grad(out, bias, cotangent)[0].cpu())
    assert_no_worse_than_eager("grad bias", *grads)
