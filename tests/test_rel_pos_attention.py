"""Attention with a shared bias: the implementations made of torch, in every way torch runs a function."""

import pytest
import torch

from fused_beit.kernels import ImplUnavailable, rel_pos_attention
from fused_beit.kernels.testing import assert_parity, outputs_and_grads, rel_pos_attention_inputs

IMPLS = ("reference", "sdpa")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention_by_loops(qkv, bias, scale):
    """One query of one head of one picture at a time, from the definition."""
    num_pictures, num_tokens, _, num_heads, head_dim = qkv.shape
    out = torch.zeros(num_pictures, num_tokens, num_heads, head_dim, dtype=qkv.dtype)
    for b in range(num_pictures):
        for h in range(num_heads):
            for i in range(num_tokens):
                scores = torch.stack([scale * qkv[b, i, 0, h].dot(qkv[b, j, 1, h]) for j in range(num_tokens)])
                weights = (scores + bias[h, i]).exp()
                out[b, i, h] = (weights / weights.sum()) @ qkv[b, :, 2, h]
    return out.flatten(2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_the_definition_written_as_loops(impl, scale):
    inputs = rel_pos_attention_inputs(2, 5, 3, 4, dtype=torch.float64)
    out = rel_pos_attention(**inputs, scale=scale, impl=impl)
    torch.testing.assert_close(out, attention_by_loops(inputs["qkv"], inputs["bias"], scale or 0.5))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [5, 50])
def test_is_no_worse_than_eager_torch(impl, with_bias, dtype, num_tokens):
    def ours(qkv, bias):
        return rel_pos_attention(qkv, bias, impl=impl)

    def eager(qkv, bias):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        probabilities = (scores if bias is None else scores + bias).softmax(-1)
        return (probabilities @ v).transpose(1, 2).flatten(2)

    assert_parity(ours, eager, rel_pos_attention_inputs(2, num_tokens, 3, 16, bias=with_bias, dtype=dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_alone_has_its_value_and_gradients_of_rounding_noise(impl, with_bias, dtype):
    """The gradients of q, k and bias are 0: grad_out v^T less the sum of grad_out * out, which are equal.

    Two sums of the same D products: each is off by at most D half units of what it sums, in the dtype of the sums. Then
    a gradient is rounded twice to its own dtype.
    """
    inputs = rel_pos_attention_inputs(2, 1, 3, 16, bias=with_bias, dtype=dtype)
    found = outputs_and_grads(lambda qkv, bias: rel_pos_attention(qkv, bias, impl=impl), inputs)
    grad_out = torch.randn(2, 1, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad_q, grad_k, grad_v = found["grad qkv"].unbind(2)
    q, k, v = inputs["qkv"].double().unbind(2)
    assert torch.equal(found["output 0"], inputs["qkv"][:, :, 2].flatten(2))
    assert torch.equal(grad_v.flatten(2), grad_out)
    finfo = torch.finfo(dtype)
    terms = (grad_out.double().unflatten(2, (3, 16)) * v).abs().sum(-1, keepdim=True)
    noise = 16 * torch.finfo(torch.float32).eps * terms * (1 + finfo.eps) ** 2
    smallest = finfo.smallest_normal * finfo.eps
    assert (grad_q.double().abs() <= 0.25 * noise * k.abs() + smallest).all()
    assert (grad_k.double().abs() <= 0.25 * noise * q.abs() + smallest).all()
    if with_bias:
        assert (found["grad bias"][..., 0, 0].double().abs() <= noise.sum((0, 1, 3)) + smallest).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_pass_gradcheck(impl):
    inputs = rel_pos_attention_inputs(2, 4, 2, 3, dtype=torch.float64)
    leaves = [inputs["qkv"].requires_grad_(), inputs["bias"].requires_grad_()]
    assert torch.autograd.gradcheck(lambda qkv, bias: rel_pos_attention(qkv, bias, impl=impl), leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_bias_gradient_is_the_sum_over_pictures_without_the_scale(impl):
    inputs = rel_pos_attention_inputs(3, 4, 2, 16, dtype=torch.float64)
    bias = inputs["bias"].requires_grad_()
    together = torch.autograd.grad(rel_pos_attention(inputs["qkv"], bias, impl=impl).sum(), bias)[0]
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4)
    probabilities = (q @ k.transpose(-2, -1) / 4 + bias.detach()).softmax(-1)
    # dP of a sum of outputs is the row sum of v for every query.
    grad_p = v.sum(-1)[:, :, None, :]
    grad_scores = probabilities * (grad_p - (probabilities * grad_p).sum(-1, keepdim=True))
    torch.testing.assert_close(together, grad_scores.sum(0))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_bias_is_not_changed(impl):
    inputs = rel_pos_attention_inputs(2, 5, 2, 4)
    before = inputs["qkv"].clone(), inputs["bias"].clone()
    rel_pos_attention(**inputs, impl=impl)
    assert torch.equal(inputs["qkv"], before[0])
    assert torch.equal(inputs["bias"], before[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_passes_opcheck(impl, with_bias):
    inputs = rel_pos_attention_inputs(2, 5, 2, 4, bias=with_bias)
    inputs["qkv"].requires_grad_()
    arguments = (inputs["qkv"], inputs["bias"], None, None, None, 0.5, True, impl)
    torch.library.opcheck(torch.ops.fused_beit.rel_pos_attention.default, arguments)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_compiles_without_a_graph_break(impl):
    def ours(qkv, bias):
        return rel_pos_attention(qkv, bias, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_parity(compiled, ours, rel_pos_attention_inputs(2, 5, 2, 4))


@pytest.mark.parametrize("impl", IMPLS)
def test_under_autocast_it_equals_bf16_inputs_and_grads_keep_the_parameters_dtype(impl):
    inputs = rel_pos_attention_inputs(2, 5, 2, 4)
    qkv, bias = inputs["qkv"].requires_grad_(), inputs["bias"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = rel_pos_attention(qkv, bias, impl=impl)
    assert torch.equal(out, rel_pos_attention(qkv.bfloat16(), bias, impl=impl))
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), [qkv, bias])
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_scores_of_any_size_stay_finite():
    inputs = rel_pos_attention_inputs(1, 5, 2, 4)
    out = rel_pos_attention(inputs["qkv"] * 1e3, inputs["bias"] * 1e4)
    assert out.isfinite().all()


def test_no_pictures_give_no_rows():
    inputs = rel_pos_attention_inputs(0, 5, 2, 4)
    assert rel_pos_attention(**inputs).shape == (0, 5, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.zeros(2, 5, 24)}, ValueError, r"qkv must have shape \[B, N, 3, H, D\], but has \[2, 5, 24\]"),
        ({"qkv": torch.zeros(2, 5, 2, 2, 4)}, ValueError, r"qkv must have shape \[B, N, 3, H, D\]"),
        ({"bias": torch.zeros(2, 5, 6)}, ValueError, r"bias must have shape \[2, 5, 5\], but has \[2, 5, 6\]"),
        ({"qkv": torch.zeros(2, 5, 3, 2, 4, dtype=torch.int32)}, TypeError, r"qkv must be a floating.*torch.int32"),
        ({"bias": torch.zeros(2, 5, 5, device="meta")}, ValueError, "bias must be on cpu as qkv is, but is on meta"),
        ({"impl": "nonsense"}, ImplUnavailable, "available: auto, reference, sdpa, xformers, flex, triton"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(change, error, message):
    with pytest.raises(error, match=message):
        rel_pos_attention(**rel_pos_attention_inputs(2, 5, 2, 4) | change)
