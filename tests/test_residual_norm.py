"""LayerScale, DropPath, residual add and the next LayerNorm."""

import pytest
import torch
from torch.nn import functional as F
from triton_families import NEEDS_INTERPRETER

from fused_beit.kernels import residual_add, residual_norm
from fused_beit.kernels.testing import assert_parity, outputs_and_grads, residual_norm_inputs

TRITON = pytest.param("triton", marks=NEEDS_INTERPRETER)
ADD_ARGUMENTS = ("x", "y", "gamma", "keep")


def eager_norm(x, y, gamma, keep, weight, bias):
    """As a transformer block writes it, one step at a time."""
    x = eager_add(x, y, gamma, keep)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def eager_add(x, y, gamma, keep):
    if gamma is not None:
        y = gamma * y
    if keep is not None:
        y = y * keep[:, None, None]
    return x + y


def add_inputs(*args, **kwargs):
    inputs = residual_norm_inputs(*args, **kwargs)
    return {name: inputs[name] for name in ADD_ARGUMENTS}


@pytest.mark.parametrize("without", [(), ("gamma",), ("keep",), ("gamma", "keep")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm_is_no_worse_than_eager_torch(dtype, without):
    assert_parity(residual_norm, eager_norm, residual_norm_inputs(4, 5, 48, dtype=dtype) | dict.fromkeys(without))


@pytest.mark.parametrize("without", [(), ("gamma",), ("keep",), ("gamma", "keep")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_add_is_no_worse_than_eager_torch(dtype, without):
    assert_parity(residual_add, eager_add, add_inputs(4, 5, 48, dtype=dtype) | dict.fromkeys(without))


def test_a_dropped_picture_passes_unchanged_and_its_branch_gets_no_gradient():
    inputs = residual_norm_inputs(2, 3, 8)
    inputs["y"].requires_grad_()
    x_new, _ = residual_norm(**inputs)
    assert inputs["keep"].tolist() == [2.0, 0.0]
    assert torch.equal(x_new[1], inputs["x"][1])
    x_new.sum().backward()
    assert not inputs["y"].grad[1].any()
    torch.testing.assert_close(inputs["y"].grad[0], (2 * inputs["gamma"]).expand(3, 8))


def test_eps_is_used():
    inputs = residual_norm_inputs(2, 3, 8) | {"gamma": None, "keep": None}
    x_new, normed = residual_norm(**inputs, eps=3.0)
    torch.testing.assert_close(normed, F.layer_norm(x_new, (8,), inputs["weight"], inputs["bias"], 3.0))


def test_under_autocast_the_stream_stays_fp32_and_the_normed_is_bf16():
    inputs = residual_norm_inputs(2, 3, 64)
    inputs["y"] = inputs["y"].bfloat16()
    exact = residual_norm(**inputs | {"y": inputs["y"].float()})
    with torch.autocast("cpu", torch.bfloat16):
        x_new, normed = residual_norm(**inputs)
        added = residual_add(*(inputs[name] for name in ADD_ARGUMENTS))
    assert torch.equal(x_new, exact[0])
    assert torch.equal(added, exact[0])
    assert torch.equal(normed, exact[1].bfloat16())


def test_a_bf16_stream_stays_bf16_beside_fp32_parameters():
    inputs = residual_norm_inputs(2, 3, 64)
    inputs |= {"x": inputs["x"].bfloat16(), "y": inputs["y"].bfloat16()}
    x_new, normed = residual_norm(**inputs)
    assert (x_new.dtype, normed.dtype) == (torch.bfloat16, torch.bfloat16)
    wide = F.layer_norm(x_new.float(), (64,), inputs["weight"], inputs["bias"], 1e-6)
    assert torch.equal(normed, wide.bfloat16())


def test_the_inputs_are_not_changed():
    inputs = residual_norm_inputs(2, 3, 8)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    residual_norm(**inputs)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name])


def test_gradients_pass_gradcheck():
    inputs = residual_norm_inputs(2, 3, 4, dtype=torch.float64)
    names = ("x", "y", "gamma", "weight", "bias")
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda x, y, g, w, b: residual_norm(x, y, g, inputs["keep"], w, b), leaves)
    assert torch.autograd.gradcheck(lambda x, y, g: residual_add(x, y, g, inputs["keep"]), leaves[:3])


def test_both_pass_opcheck():
    inputs = residual_norm_inputs(2, 3, 8)
    inputs["x"].requires_grad_()
    arguments = tuple(inputs.values())
    torch.library.opcheck(torch.ops.fused_beit.residual_norm.default, (*arguments, 1e-6, "reference"))
    torch.library.opcheck(torch.ops.fused_beit.residual_add.default, (*arguments[:4], "reference"))


@pytest.mark.parametrize(
    ("function", "inputs"), [(residual_norm, residual_norm_inputs(2, 3, 8)), (residual_add, add_inputs(2, 3, 8))]
)
def test_both_compile_without_a_graph_break(function, inputs):
    torch.compiler.reset()
    assert_parity(torch.compile(function, fullgraph=True, backend="aot_eager"), function, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(6, 8)}, ValueError, r"x must have shape \[B, N, D\], but has \[6, 8\]"),
        ({"y": torch.zeros(2, 4, 8)}, ValueError, r"y must have shape \[2, 3, 8\], but has \[2, 4, 8\]"),
        ({"gamma": torch.zeros(1)}, ValueError, r"gamma must have shape \[8\], but has \[1\]"),
        ({"keep": torch.zeros(2, 1, 1)}, ValueError, r"keep must have shape \[2\], but has \[2, 1, 1\]"),
        ({"keep": torch.zeros(2).bool()}, TypeError, r"keep must be a floating-point tensor, but is torch.bool"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias must have shape \[8\], but has \[9\]"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(change, error, message):
    with pytest.raises(error, match=message):
        residual_norm(**residual_norm_inputs(2, 3, 8) | change)


@pytest.mark.parametrize("impl", ["reference", TRITON])
@pytest.mark.parametrize("without", [("bias",), ("weight", "bias"), ("weight",)], ids=str)
def test_a_layer_norm_without_weight_or_bias_is_served(without, impl):
    inputs = residual_norm_inputs(2, 3, 12, dtype=torch.float64) | dict.fromkeys(without)
    keep = inputs.pop("keep")
    found = outputs_and_grads(lambda **given: residual_norm(**given, keep=keep, impl=impl), inputs)
    expected = outputs_and_grads(lambda **given: eager_norm(**given, keep=keep), inputs)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", TRITON])
def test_a_bias_that_is_left_out_is_a_bias_of_zeros(impl):
    inputs = residual_norm_inputs(2, 3, 12, dtype=torch.float16)
    zeros = inputs | {"bias": torch.zeros(12, dtype=torch.float16)}
    without = residual_norm(**inputs | {"bias": None}, impl=impl)
    assert torch.equal(without[1], residual_norm(**zeros, impl=impl)[1])
