"""The Triton attention in the ways torch runs a function, in Triton's interpreter, and in a fixed order of its sums."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from triton_families import FAMILIES, NEEDS_INTERPRETER, exact_products  # noqa: F401

from fused_beit.kernels import attention, rel_pos_attention
from fused_beit.kernels._triton.launching import product_precision
from fused_beit.kernels.rel_pos_attention import launch
from fused_beit.kernels.rel_pos_attention.plan import pinned
from fused_beit.kernels.testing import assert_parity, outputs_and_grads, rel_pos_attention_inputs

pytestmark = NEEDS_INTERPRETER


def ours(qkv, bias, **options):
    return rel_pos_attention(qkv, bias, impl="triton", **options)


def reference(qkv, bias, **options):
    return rel_pos_attention(qkv, bias, impl="reference", **options)


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("by", ["set_float32_matmul_precision", "fp32_precision"])
def test_products_of_fp32_are_exact_unless_torch_was_told_that_they_need_not_be(by):
    assert product_precision(torch.float32) == "ieee"
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision
    try:
        if by == "fp32_precision":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert product_precision(torch.float32) == "tf32"
        assert product_precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cuda.matmul.fp32_precision = before[1]
    assert product_precision(torch.float32) == "ieee"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_pass_gradcheck(family):
    inputs = rel_pos_attention_inputs(2, 3, 1, 8, dtype=torch.float64)
    leaves = [inputs["qkv"].requires_grad_(), inputs["bias"].requires_grad_()]
    mask = torch.tensor([[0.0, -1.0, 0.5]], dtype=torch.float64)[None]
    with pinned(FAMILIES[family]):
        assert torch.autograd.gradcheck(lambda qkv, bias: ours(qkv, bias, mask=mask), leaves, fast_mode=True)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_its_operator_passes_opcheck(packed, with_bias, with_mask):
    inputs = rel_pos_attention_inputs(2, 5, 1, 8)
    qkv = inputs["qkv"]
    tensors = [qkv, None, None] if packed else [tensor.clone() for tensor in qkv.permute(2, 0, 3, 1, 4)]
    bias = inputs["bias"].requires_grad_() if with_bias else None
    mask = torch.zeros(2, 1, 5) if with_mask else None
    rounded = inputs["bias"].detach().clone() if with_bias and with_mask else None
    for tensor in tensors if not packed else [qkv]:
        tensor.requires_grad_()
    arguments = (*tensors, bias, rounded, mask, 0.3, True)
    torch.library.opcheck(torch.ops.fused_beit.attention_fwd.default, arguments)


def test_the_operator_of_its_backward_passes_opcheck():
    inputs = rel_pos_attention_inputs(2, 5, 1, 8)
    qkv, bias = inputs["qkv"], inputs["bias"]
    out, lse = torch.ops.fused_beit.attention_fwd(qkv, None, None, bias, None, None, 0.3, True)
    arguments = (out, qkv, None, None, bias, None, out, lse, 0.3, qkv.clone(), None, None, bias.clone(), True)
    torch.library.opcheck(torch.ops.fused_beit.attention_bwd.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend):
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    assert_parity(compiled, ours, rel_pos_attention_inputs(2, 5, 2, 8))


@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
def test_compiles_with_a_gradient_that_two_layers_add_to_one_tensor(impl):
    inputs = rel_pos_attention_inputs(2, 5, 1, 8)

    def two_layers(qkv, bias, accumulate_into):
        options = {"impl": impl, "accumulate_into": accumulate_into}
        first = rel_pos_attention(qkv, bias, **options)
        return rel_pos_attention(qkv * first.unflatten(2, (1, 1, 8)), bias, **options)

    torch.compiler.reset()
    sums = []
    for function in (two_layers, torch.compile(two_layers, fullgraph=True, backend="aot_eager")):
        qkv, bias = inputs["qkv"].clone().requires_grad_(), inputs["bias"].clone().requires_grad_()
        gradient = torch.ones(1, 5, 5)
        function(qkv, bias, gradient).sum().backward()
        assert bias.grad is None
        sums.append((gradient, qkv.grad))
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-6)


def test_under_autocast_it_equals_half_precision_and_grads_keep_the_parameters_dtype():
    inputs = rel_pos_attention_inputs(2, 5, 1, 8)
    qkv, bias = inputs["qkv"].requires_grad_(), inputs["bias"].requires_grad_()
    with torch.autocast("cpu", torch.float16):  # bf16 is what the interpreter cannot do
        out = ours(qkv, bias)
        apart = attention(*qkv.permute(2, 0, 3, 1, 4), bias, impl="triton")
    assert torch.equal(out, ours(qkv.half(), bias))
    assert torch.equal(out, apart.transpose(1, 2).flatten(2))
    assert out.dtype == torch.float16
    grads = torch.autograd.grad(out.sum(), [qkv, bias])
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_checkpointing_changes_no_bit():
    inputs = rel_pos_attention_inputs(2, 21, 1, 16)
    plain = outputs_and_grads(ours, inputs)
    assert equal(outputs_and_grads(lambda qkv, bias: checkpoint(ours, qkv, bias, use_reentrant=False), inputs), plain)


def test_without_gradients_the_output_is_the_same():
    inputs = rel_pos_attention_inputs(2, 21, 1, 16)
    with torch.no_grad():
        out = ours(inputs["qkv"].requires_grad_(), inputs["bias"].requires_grad_())
    assert not out.requires_grad
    assert torch.equal(out, ours(**inputs))


@pytest.mark.parametrize("of", ["qkv", "bias"])
def test_a_gradient_of_a_gradient_is_refused(of):
    inputs = {name: tensor.requires_grad_() for name, tensor in rel_pos_attention_inputs(1, 5, 1, 8).items()}
    grads = torch.autograd.grad(ours(**inputs).square().sum(), list(inputs.values()), create_graph=True)
    penalty = sum(tensor.sum() for tensor in inputs.values()) + dict(zip(inputs, grads, strict=True))[of].sum()
    with pytest.raises(RuntimeError, match=r"attention: impl='triton' has no second derivative.* use impl='reference'"):
        penalty.backward()


@pytest.mark.parametrize("of", ["qkv", "bias"])
def test_a_forward_mode_derivative_is_refused(of):
    inputs = rel_pos_attention_inputs(1, 5, 1, 8)
    with pytest.raises(RuntimeError, match="no forward-mode derivative; use impl='reference'"):
        torch.func.jvp(lambda tensor: ours(**inputs | {of: tensor}), (inputs[of],), (torch.ones_like(inputs[of]),))


@pytest.mark.parametrize("order", ["transposed", "expanded"])
def test_a_gradient_of_the_output_may_have_any_strides(order):
    q, k, v = rel_pos_attention_inputs(2, 21, 2, 16, dtype=torch.float64)["qkv"].permute(2, 0, 3, 1, 4)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    cotangent = torch.randn(2, 2, 16, 21, dtype=torch.float64).transpose(-2, -1)
    if order == "expanded":
        cotangent = cotangent[:, :1, :1].expand(2, 2, 21, 16)
    found = torch.autograd.grad(attention(*leaves, impl="triton"), leaves, cotangent)
    expected = torch.autograd.grad(attention(*leaves, impl="reference"), leaves, cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_give_the_same_bits(family):
    inputs = rel_pos_attention_inputs(3, 37, 1, 16)
    with pinned(FAMILIES[family]):
        assert equal(outputs_and_grads(ours, inputs), outputs_and_grads(ours, inputs))


def bytes_of_pictures(count, num_tokens, dtype):
    """A workspace for so many pictures of one head."""
    row = -(-num_tokens // 16) * 16 * dtype.itemsize
    return count * num_tokens * row


@pytest.mark.parametrize(("family", "dtype"), [("pointer", torch.float32), ("tma", torch.float16)])
def test_a_small_workspace_is_used_pass_after_pass(family, dtype, monkeypatch):
    inputs = rel_pos_attention_inputs(5, 21, 1, 16, dtype=dtype)
    pictures = []
    summed = launch._launch_bias_grad_sum

    def recorded(call, grad_scores, grad_bias, num_pictures, add_to):
        pictures.append((num_pictures, grad_scores.shape[0], add_to))
        summed(call, grad_scores, grad_bias, num_pictures, add_to)

    monkeypatch.setattr(launch, "_launch_bias_grad_sum", recorded)
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", bytes_of_pictures(2, 21, dtype))
    with pinned(FAMILIES[family]):
        assert_parity(ours, reference, inputs)
        assert pictures == [(2, 2, False), (2, 2, True), (1, 2, True)]


@pytest.mark.parametrize("pictures_a_pass", [1, 3])
@pytest.mark.parametrize(("family", "dtype"), [("pointer", torch.float32), ("tma", torch.float16)])
def test_the_size_of_the_workspace_changes_no_bit(family, dtype, pictures_a_pass, monkeypatch):
    inputs = rel_pos_attention_inputs(5, 21, 1, 16, dtype=dtype)
    with pinned(FAMILIES[family]):
        one_pass = outputs_and_grads(ours, inputs)
        monkeypatch.setattr(launch, "WORKSPACE_BYTES", bytes_of_pictures(pictures_a_pass, 21, dtype))
        assert equal(outputs_and_grads(ours, inputs), one_pass)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "held"), [(197, 12, 136), (197, 16, 102), (577, 16, 12), (1025, 16, 3)]
)
def test_the_workspace_does_not_grow_with_the_batch(num_tokens, num_heads, held):
    """The counts of kernels/rel_pos_attention/README.md: BEiT-base at 128 pictures is one pass."""
    shape = (num_heads, num_tokens, torch.bfloat16)
    for batch in (128, 1024, 2**20):
        pictures = launch.num_pictures_a_pass(batch, *shape)
        assert pictures == min(batch, held)
        assert pictures * launch.bytes_a_picture(*shape) <= 128 * 2**20


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_uses_the_masks_of_its_own_pictures(family, monkeypatch):
    mask = torch.randn(3, 1, 21, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = rel_pos_attention_inputs(3, 21, 1, 16, dtype=torch.float64)
    expected = outputs_and_grads(lambda qkv, bias: reference(qkv, bias, mask=mask), inputs)
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", bytes_of_pictures(2, 21, torch.float64))
    with pinned(FAMILIES[family]):
        found = outputs_and_grads(lambda qkv, bias: ours(qkv, bias, mask=mask), inputs)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_a_workspace_for_no_picture_holds_one(monkeypatch):
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 0)
    assert launch.num_pictures_a_pass(8, 12, 197, torch.bfloat16) == 1


def test_many_passes_add_to_a_tensor_of_many_layers(monkeypatch):
    inputs = rel_pos_attention_inputs(5, 21, 1, 16, dtype=torch.float64)
    expected = outputs_and_grads(reference, inputs)["grad bias"]
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", bytes_of_pictures(2, 21, torch.float64))
    gradient = torch.ones(1, 21, 21, dtype=torch.float64)
    outputs_and_grads(lambda qkv, bias: ours(qkv, bias, accumulate_into=gradient), inputs)
    torch.testing.assert_close(gradient, 1 + expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "dtype"), [("pointer", torch.float32), ("tma", torch.float32), ("tma", torch.float16)]
)
def test_in_no_fixed_order_it_is_no_worse_than_eager_torch(family, dtype):
    with pinned(FAMILIES[family]):
        assert_parity(
            lambda qkv, bias: ours(qkv, bias, deterministic=False),
            reference,
            rel_pos_attention_inputs(3, 37, 1, 16, dtype=dtype),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_in_no_fixed_order_it_adds_to_a_tensor_of_many_layers(family):
    inputs = rel_pos_attention_inputs(3, 21, 1, 16, dtype=torch.float64)
    expected = outputs_and_grads(reference, inputs)["grad bias"]
    gradient = torch.ones(1, 21, 21, dtype=torch.float64)
    with pinned(FAMILIES[family]):
        outputs_and_grads(lambda qkv, bias: ours(qkv, bias, accumulate_into=gradient, deterministic=False), inputs)
    torch.testing.assert_close(gradient, 1 + expected, rtol=1e-12, atol=1e-12)
