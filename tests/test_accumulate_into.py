"""`accumulate_into`: the gradient of the bias of many layers in one tensor, and only where it is wanted."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from triton_families import NEEDS_INTERPRETER, exact_products  # noqa: F401

from fused_beit.kernels import RelativePositionBias, SharedBias, rel_pos_attention
from fused_beit.kernels.testing import assert_no_worse_than_eager, outputs_and_grads, rel_pos_attention_inputs

IMPLS = ["reference", "sdpa", pytest.param("triton", marks=NEEDS_INTERPRETER)]
NUM_TOKENS = 7


def inputs_of(batch, *, dtype=torch.float64):
    return rel_pos_attention_inputs(batch, NUM_TOKENS, 2, 8, dtype=dtype)


def run(impl, *, bias_dtype=None, deterministic=True):
    """qkv, bias, an empty buffer and a loss whose backward adds to it."""
    inputs = inputs_of(2, dtype=torch.float32)
    qkv, bias = inputs["qkv"].requires_grad_(), inputs["bias"].to(bias_dtype or torch.float32).requires_grad_()
    buffer = torch.zeros(2, NUM_TOKENS, NUM_TOKENS)
    out = rel_pos_attention(qkv, bias, accumulate_into=buffer, deterministic=deterministic, impl=impl)
    return qkv, bias, buffer, out.square().sum()


def gradient_of_bias(impl, **options):
    _, _, buffer, loss = run(impl, **options)
    loss.backward()
    return buffer


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_of_many_layers_is_added_to_what_is_there(impl):
    inputs = inputs_of(2)
    options = {"impl": impl}
    expected = outputs_and_grads(lambda qkv, bias: rel_pos_attention(qkv, bias, **options), inputs)
    gradient = torch.full((2, NUM_TOKENS, NUM_TOKENS), 5.0, dtype=torch.float64)
    for _ in range(2):
        found = outputs_and_grads(
            lambda qkv, bias: rel_pos_attention(qkv, bias, accumulate_into=gradient, **options), inputs
        )
        assert "grad bias" not in found
        torch.testing.assert_close(found["grad qkv"], expected["grad qkv"], rtol=0, atol=0)
    torch.testing.assert_close(gradient, 5 + 2 * expected["grad bias"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_gradient_of_many_layers_is_kept_in_fp32(dtype, impl):
    inputs = inputs_of(3, dtype=dtype)
    gradient = torch.zeros(2, NUM_TOKENS, NUM_TOKENS)
    outputs_and_grads(lambda qkv, bias: rel_pos_attention(qkv, bias, accumulate_into=gradient, impl=impl), inputs)
    double = {name: tensor.double() for name, tensor in inputs.items()}
    eager, exact = (outputs_and_grads(rel_pos_attention, given)["grad bias"] for given in (inputs, double))
    assert_no_worse_than_eager("gradient", gradient.to(dtype), eager, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_of_something_else_leaves_it_alone(impl):
    qkv, _, buffer, loss = run(impl)
    torch.autograd.grad(loss, qkv, retain_graph=True)
    assert not buffer.any()
    loss.backward()
    assert torch.equal(buffer, gradient_of_bias(impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_backward_for_other_leaves_alone_leaves_it_alone(impl):
    qkv, _, buffer, loss = run(impl)
    loss.backward(inputs=[qkv])
    assert not buffer.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_penalty_over_another_graph_leaves_it_alone(impl):
    qkv, _, buffer, loss = run(impl)
    (grad,) = torch.autograd.grad(loss, qkv, create_graph=impl != "triton", retain_graph=True)
    assert not buffer.any()
    assert grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_backward_in_no_fixed_order_leaves_it_alone_too(impl):
    qkv, _, buffer, loss = run(impl, deterministic=False)
    torch.autograd.grad(loss, qkv, retain_graph=True)
    assert not buffer.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_every_backward_that_wants_it_adds_it_once(impl):
    _, _, buffer, loss = run(impl)
    loss.backward(retain_graph=True)
    once = buffer.clone()
    loss.backward()
    assert torch.equal(buffer, once + once)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_sum_over_layers_has_the_bits_of_adding_their_gradients(impl):
    inputs = inputs_of(2, dtype=torch.float32)
    buffer = torch.zeros(2, NUM_TOKENS, NUM_TOKENS)
    total = torch.zeros_like(buffer)
    for seed in range(3):
        qkv = rel_pos_attention_inputs(2, NUM_TOKENS, 2, 8, seed=seed)["qkv"]
        bias = inputs["bias"].clone().requires_grad_()
        rel_pos_attention(qkv, bias, accumulate_into=buffer, impl=impl).square().sum().backward()
        own = inputs["bias"].clone().requires_grad_()
        rel_pos_attention(qkv, own, impl=impl).square().sum().backward()
        total += own.grad
    assert torch.equal(buffer, total)


@NEEDS_INTERPRETER
def test_the_gradient_of_a_bias_in_half_precision_is_not_rounded_before_it_is_added():
    buffer = gradient_of_bias("triton", bias_dtype=torch.float16)
    assert not torch.equal(buffer, buffer.half().float())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_shared_bias_may_give_its_gradient_to_it(impl):
    module = RelativePositionBias((2, 3), 2)
    bias, rounded = module.shared(torch.float16)
    qkv = inputs_of(2, dtype=torch.float16)["qkv"]
    buffer = torch.zeros(2, NUM_TOKENS, NUM_TOKENS)
    rel_pos_attention(
        qkv, SharedBias(bias, rounded), accumulate_into=buffer, impl=impl
    ).float().square().sum().backward()
    assert buffer.any()
    assert module.relative_position_bias_table.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_a_layer_under_activation_checkpointing_adds_once(impl):
    inputs = inputs_of(2, dtype=torch.float32)
    buffer = torch.zeros(2, NUM_TOKENS, NUM_TOKENS)
    qkv, bias = inputs["qkv"].requires_grad_(), inputs["bias"].requires_grad_()

    def layer(qkv, bias):
        return rel_pos_attention(qkv, bias, accumulate_into=buffer, impl=impl)

    checkpoint(layer, qkv, bias, use_reentrant=False).square().sum().backward()
    assert torch.equal(buffer, gradient_of_bias(impl))
