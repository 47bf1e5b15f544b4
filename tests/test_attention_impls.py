"""What every implementation of attention must do with masks, strides, a shared gradient, and what it cannot do."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from triton_families import NEEDS_INTERPRETER, exact_products  # noqa: F401

from fused_beit.kernels import ImplUnavailable, RelativePositionBias, SharedBias, attention, rel_pos_attention
from fused_beit.kernels.testing import (
    assert_no_worse_than_eager,
    outputs_and_grads,
    rel_pos_attention_inputs,
)

TRITON = pytest.param("triton", marks=NEEDS_INTERPRETER)
IMPLS = ["reference", "sdpa", TRITON]
NUM_TOKENS = 7


def inputs_of(batch, *, dtype=torch.float64, bias=True):
    return rel_pos_attention_inputs(batch, NUM_TOKENS, 2, 8, dtype=dtype, bias=bias)


def attention_by_pictures(qkv, bias, masks, scale):
    """One picture after another, each with a mask of its own; `masks` is a list of [N, N], numbers to add."""
    outputs = []
    for picture, mask in zip(qkv, masks, strict=True):
        q, k, v = picture.permute(1, 2, 0, 3)
        scores = scale * q @ k.transpose(-2, -1) + mask
        if bias is not None:
            scores = scores + bias
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.stack(outputs)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", [*IMPLS, "flex"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", ["N,N", "1,N,N", "2,N,N", "4,N,N", "1,1,N", "2,1,N"])
def test_picture_b_uses_mask_b_modulo_their_number(shape, kind, impl):
    sizes = [NUM_TOKENS if size == "N" else int(size) for size in shape.split(",")]
    generator = torch.Generator().manual_seed(0)
    mask = torch.randn(sizes, generator=generator, dtype=torch.float64)
    if kind == "bool":
        mask = mask > 0
        mask[..., 2] = True  # no query without keys
    added = torch.zeros(sizes, dtype=torch.float64).masked_fill(~mask, float("-inf")) if kind == "bool" else mask
    added = added.expand(1, *sizes) if len(sizes) == 2 else added
    masks = [added[b % added.shape[0]].expand(NUM_TOKENS, NUM_TOKENS) for b in range(4)]
    inputs = rel_pos_attention_inputs(4, NUM_TOKENS, 1, 8, dtype=torch.float64)
    if impl == "flex":  # it has no backward on a CPU
        out = rel_pos_attention(**inputs, mask=mask, scale=0.3, impl=impl)
        torch.testing.assert_close(out, attention_by_pictures(**inputs, masks=masks, scale=0.3))
        return
    found = outputs_and_grads(lambda qkv, bias: rel_pos_attention(qkv, bias, mask=mask, scale=0.3, impl=impl), inputs)
    assert_close(found, outputs_and_grads(lambda qkv, bias: attention_by_pictures(qkv, bias, masks, 0.3), inputs))


@pytest.mark.parametrize("impl", IMPLS)
def test_shifted_windows_are_masked_as_in_swin(impl):
    """Windows of 4 patches of one row of 8, shifted by 2: the last window of a picture holds both ends of the row."""
    part = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 2]])  # [windows, patches]: what belongs together
    mask = part[:, :, None] == part[:, None, :]
    qkv = rel_pos_attention_inputs(4, 4, 1, 8, dtype=torch.float64)["qkv"]  # window w of picture p is row 2 p + w
    out = rel_pos_attention(qkv, None, mask=mask, impl=impl)
    for row in (1, 3):
        for half in (slice(0, 2), slice(2, 4)):
            alone = rel_pos_attention(qkv[row : row + 1, half], None, impl="reference")
            torch.testing.assert_close(out[row : row + 1, half], alone)
    torch.testing.assert_close(out[::2], rel_pos_attention(qkv[::2], None, impl="reference"))


@pytest.mark.parametrize("impl", [*IMPLS, "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_query_whose_keys_are_all_masked_gives_zeros(dtype, impl):
    mask = torch.ones(2, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    mask[0, 3] = False
    mask[1] = False
    out = rel_pos_attention(**inputs_of(2, dtype=dtype), mask=mask, impl=impl)
    assert out.isfinite().all()
    assert not out[0, 3].any()
    assert not out[1].any()
    assert out[0, :3].any(-1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_query_whose_keys_are_all_masked_has_gradients_of_zero(dtype, impl):
    mask = torch.ones(2, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    mask[0, 3] = False
    mask[1] = False
    inputs = inputs_of(2, dtype=dtype)
    found = outputs_and_grads(lambda qkv, bias: rel_pos_attention(qkv, bias, mask=mask, impl=impl), inputs)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert not found["grad qkv"][0, 3, 0].any()
    assert not found["grad qkv"][1].any()
    assert not found["grad bias"][:, 3].any()


HIDDEN = float("-inf")


def with_dead_rows(bias):
    """No key for query 3 of head 0 and for all of head 1, and one key hidden from query 1."""
    bias = bias.clone()
    bias[0, 3] = bias[1] = bias[0, 1, 2] = HIDDEN
    return bias


@pytest.mark.parametrize("impl", [*IMPLS, "flex"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_query_to_which_the_bias_leaves_no_key_gives_zeros(masked, dtype, impl):
    inputs = inputs_of(2, dtype=dtype)
    mask = torch.zeros(NUM_TOKENS, NUM_TOKENS) if masked else None
    out = rel_pos_attention(inputs["qkv"], with_dead_rows(inputs["bias"]), mask=mask, impl=impl)
    heads = out.unflatten(2, (2, 8))
    assert not heads[:, 3, 0].any()
    assert not heads[:, :, 1].any()
    assert out.isfinite().all()
    assert heads[:, :3, 0].any(-1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("hidden_by", ["bias", "bias and mask"])
def test_a_query_to_which_the_bias_leaves_no_key_has_gradients_of_zero(hidden_by, impl):
    inputs = inputs_of(2)
    inputs["bias"] = with_dead_rows(inputs["bias"])
    mask = None
    if hidden_by == "bias and mask":  # half of the keys each
        inputs["bias"][0, 3, 4:] = 0
        mask = torch.zeros(NUM_TOKENS, NUM_TOKENS, dtype=torch.float64)
        mask[3, 4:] = HIDDEN
    learned = impl != "reference" or hidden_by == "bias and mask"  # the reference takes one that learns to be finite
    found = outputs_and_grads(
        lambda qkv, bias: rel_pos_attention(qkv, bias if learned else bias.detach(), mask=mask, impl=impl), inputs
    )
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert not found["grad qkv"][:, 3, 0, 0].any()
    assert not found["grad qkv"][:, :, :, 1].any()
    if learned:
        assert not found["grad bias"][0, 3].any()
        assert not found["grad bias"][1].any()
    # The queries that are left see what they would see without the others.
    alone = inputs_of(2)
    alone["bias"][0, 1, 2] = HIDDEN
    others = [0, 1, 2, 4, 5, 6]
    expected = rel_pos_attention(**alone, impl="reference")
    if hidden_by == "bias":
        torch.testing.assert_close(found["output 0"][:, others, :8], expected[:, others, :8])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_spread_from_a_masked_key(bad, impl):
    inputs = inputs_of(1)
    inputs["qkv"][0, 2, 2] = bad  # the value of token 2
    mask = torch.ones(1, NUM_TOKENS, dtype=torch.bool)
    mask[0, 2] = False
    assert rel_pos_attention(**inputs, mask=mask[None], impl=impl).isnan().any()
    inputs["qkv"][0, 2, 2] = 1e10
    assert rel_pos_attention(**inputs, mask=mask[None], impl=impl).isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_in_fp32_serves_half_precision(impl):
    mask = torch.randn(1, 1, NUM_TOKENS, generator=torch.Generator().manual_seed(0)).half()
    inputs = inputs_of(2, dtype=torch.float16)
    in_half = outputs_and_grads(lambda qkv, bias: rel_pos_attention(qkv, bias, mask=mask, impl=impl), inputs)
    in_fp32 = outputs_and_grads(lambda qkv, bias: rel_pos_attention(qkv, bias, mask=mask.float(), impl=impl), inputs)
    assert all(torch.equal(in_half[name], in_fp32[name]) for name in in_half)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("of_model", ["timm", "transposed", "shared key and value", "slices"])
def test_query_key_and_value_may_have_the_strides_of_other_models(of_model, impl):
    def views(qkv):  # [B, N, 3, H, D]
        if of_model == "timm":
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if of_model == "transposed":
            return [tensor.contiguous().transpose(1, 2) for tensor in qkv.unbind(2)]
        if of_model == "slices":
            return [tensor[..., :8] for tensor in torch.cat([qkv, qkv], -1).permute(2, 0, 3, 1, 4)]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k[:, :1].expand(q.shape), v[:, :1].expand(q.shape)  # one head for all queries, with stride 0

    def function(impl, layout):
        return lambda qkv, bias: attention(*map(layout, views(qkv)), bias, impl=impl)

    inputs = inputs_of(2)
    found = outputs_and_grads(function(impl, lambda tensor: tensor), inputs)
    assert_close(found, outputs_and_grads(function("reference", torch.Tensor.contiguous), inputs))


@pytest.mark.parametrize("impl", IMPLS)
def test_both_operators_are_one(impl):
    inputs = inputs_of(2, dtype=torch.float32)

    def apart(qkv, bias):
        return attention(*qkv.permute(2, 0, 3, 1, 4), bias, impl=impl).transpose(1, 2).flatten(2)

    packed = outputs_and_grads(lambda qkv, bias: rel_pos_attention(qkv, bias, impl=impl), inputs)
    found = outputs_and_grads(apart, inputs)
    assert all(torch.equal(found[name], packed[name]) for name in packed)


@NEEDS_INTERPRETER
def test_triton_leaves_the_heads_of_a_token_side_by_side():
    out = attention(*inputs_of(2)["qkv"].permute(2, 0, 3, 1, 4), impl="triton")
    assert out.transpose(1, 2).is_contiguous()


@NEEDS_INTERPRETER
def test_triton_refuses_channels_that_are_not_side_by_side():
    q, k, v = inputs_of(2)["qkv"].permute(2, 0, 3, 1, 4)
    k = k.transpose(-2, -1).contiguous().transpose(-2, -1)
    with pytest.raises(
        ValueError, match=r"last stride of 1, but got strides \(112, 56, 1, 7\) for shape \[2, 2, 7, 8\]"
    ):
        attention(q, k, v, impl="triton")


def test_flex_takes_no_pictures_with_a_mask():
    nothing = torch.zeros(0, 2, NUM_TOKENS, 16)
    assert (
        attention(nothing, nothing, nothing, mask=torch.zeros(NUM_TOKENS, NUM_TOKENS), impl="flex").shape
        == nothing.shape
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_no_pictures_give_no_rows_and_gradients_of_zero(impl):
    empty = inputs_of(0)
    mask = torch.zeros(2, 1, NUM_TOKENS)
    found = outputs_and_grads(lambda qkv, bias: rel_pos_attention(qkv, bias, mask=mask, impl=impl), empty)
    assert found["output 0"].shape == (0, NUM_TOKENS, 16)
    assert found["grad qkv"].shape == empty["qkv"].shape
    zeros = torch.zeros_like(empty["bias"])
    # Torch's own attention then says by None that the bias has no gradient.
    assert torch.equal(found.get("grad bias", zeros) if impl == "sdpa" else found["grad bias"], zeros)


def test_flex_on_a_cpu_is_no_worse_than_eager_torch():
    mask = torch.randn(3, 1, NUM_TOKENS, generator=torch.Generator().manual_seed(0))
    inputs = inputs_of(3, dtype=torch.float32)
    double = {name: tensor.double() for name, tensor in inputs.items()}
    out, eager = (rel_pos_attention(**inputs, mask=mask, impl=impl) for impl in ("flex", "reference"))
    exact = rel_pos_attention(**double, mask=mask.double(), impl="reference")
    assert_no_worse_than_eager("output", out, eager, exact)


@pytest.mark.parametrize("learned", ["qkv", "bias"])
def test_flex_on_a_cpu_refuses_a_gradient(learned):
    inputs = inputs_of(2)
    inputs[learned].requires_grad_()
    with pytest.raises(ImplUnavailable, match=r"impl='flex' was asked for, but FlexAttention has no backward on a CPU"):
        rel_pos_attention(**inputs, impl="flex")


def test_flex_on_a_cpu_runs_a_model_without_gradients():
    inputs = inputs_of(2)
    inputs["qkv"].requires_grad_()
    with torch.no_grad():
        out = rel_pos_attention(**inputs, impl="flex")
    torch.testing.assert_close(out, rel_pos_attention(**inputs, impl="reference").detach())


def test_xformers_is_refused_on_a_cpu_with_the_reason():
    missing = importlib.util.find_spec("xformers") is None
    why = r"xformers is not installed \(pip install xformers\)" if missing else "xformers has no operator for cpu"
    with pytest.raises(ImplUnavailable, match=f"impl='xformers' was asked for, but {why}"):
        rel_pos_attention(**inputs_of(2), impl="xformers")


@NEEDS_INTERPRETER
@pytest.mark.parametrize("head_dim", [4, 12, 136])
def test_triton_refuses_heads_of_other_sizes(head_dim):
    inputs = rel_pos_attention_inputs(1, 5, 1, head_dim)
    with pytest.raises(ImplUnavailable, match=f"of 8 channels, at most 128, but they have {head_dim}; use impl="):
        rel_pos_attention(**inputs, impl="triton")


@NEEDS_INTERPRETER
def test_triton_refuses_bf16_in_its_interpreter():
    inputs = inputs_of(2, dtype=torch.bfloat16)
    with pytest.raises(ImplUnavailable, match="interpreter computes bfloat16 wrongly; use float32 or float16 there"):
        rel_pos_attention(**inputs, impl="triton")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ImplUnavailable, match="attention: impl='triton' was asked for, but Triton's interpreter"),
    ):
        attention(*inputs_of(2, dtype=torch.float32)["qkv"].permute(2, 0, 3, 1, 4), impl="triton")


@pytest.mark.parametrize(
    ("before", "why"),
    [
        ("pass", "Triton needs a GPU and the tensors are on cpu; TRITON_INTERPRET=1 runs it slowly anywhere"),
        ("import sys; sys.modules['triton'] = None", "triton is not installed"),
    ],
    ids=["no GPU", "no triton"],
)
def test_where_triton_cannot_run_it_is_refused_with_the_reason(before, why):
    script = f"""{before}
import torch
from fused_beit.kernels import ImplUnavailable, RelativePositionBias, SharedBias, attention, rel_pos_attention
try:
    rel_pos_attention(torch.zeros(1, 5, 3, 1, 8), None, impl="triton")
except ImplUnavailable as error:
    print(error)
try:
    attention(*torch.zeros(3, 1, 1, 5, 8), impl="triton")
except ImplUnavailable as error:
    print(error)
print(rel_pos_attention(torch.zeros(1, 5, 3, 1, 8), None).sum().item())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    refused = [f"{name}: impl='triton' was asked for, but {why}" for name in ("rel_pos_attention", "attention")]
    assert done.stdout.splitlines() == [*refused, "0.0"]


def test_in_no_fixed_order_is_refused_where_torch_must_be_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"deterministic=False was asked for, but .*; leave deterministic=True"):
            rel_pos_attention(**inputs_of(2), deterministic=False)
        assert rel_pos_attention(**inputs_of(2)).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def numbers(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": numbers(2, 2, 7, 4)}, ValueError, r"k must have shape \[2, 2, 7, 8\], but has \[2, 2, 7, 4\]"),
        ({"v": numbers(2, 2, 5, 8)}, ValueError, r"v must have shape \[2, 2, 7, 8\], but has \[2, 2, 5, 8\]"),
        ({"q": numbers(2, 7, 8)}, ValueError, r"q must have shape \[B, H, N, D\], but has \[2, 7, 8\]"),
        (
            {"k": numbers(2, 2, 7, 8, dtype=torch.float16)},
            TypeError,
            "q, k and v must have one dtype, but have torch.float32, torch.float16 and torch.float32",
        ),
        ({"v": torch.zeros(2, 2, 7, 8, device="meta")}, ValueError, "v must be on cpu as q is, but is on meta"),
        ({"bias": numbers(1, 7, 7)}, ValueError, r"bias must have shape \[2, 7, 7\], but has \[1, 7, 7\]"),
        ({"mask": numbers(6, 7)}, ValueError, r"mask must have shape \[7, 7\], .* a divisor of 2, but has \[6, 7\]"),
        ({"mask": numbers(2, 7, 6)}, ValueError, r"\[W, 1, 7\] with W a divisor of 2, but has \[2, 7, 6\]"),
        ({"mask": numbers(3, 7, 7)}, ValueError, r"with W a divisor of 2, but has \[3, 7, 7\]"),
        ({"mask": numbers(0, 7, 7)}, ValueError, r"with W a divisor of 2, but has \[0, 7, 7\]"),
        ({"mask": numbers(7, 7).requires_grad_()}, ValueError, "mask gets no gradient, .* learned belongs into bias"),
        ({"mask": numbers(7, 7).long()}, TypeError, "mask must be bool .* or floating point, but is torch.int64"),
        ({"mask": torch.zeros(7, 7, device="meta")}, ValueError, "mask must be on cpu as q is, but is on meta"),
        (
            {"bias": SharedBias(numbers(2, 7, 7), numbers(2, 7, 7, dtype=torch.float16))},
            TypeError,
            r"rounded to torch.float16, but the products are in torch.float32; give .*shared\(torch.float32\)",
        ),
        ({"bias": RelativePositionBias((2, 3), 2)}, TypeError, r"bias must be a tensor .* is called first"),
        (
            {"accumulate_into": numbers(2, 7, 7)},
            ValueError,
            "of bias, which requires none; leave accumulate_into",
        ),
        (
            {"accumulate_into": numbers(2, 7, 6)},
            ValueError,
            r"accumulate_into must have shape \[2, 7, 7\], but has \[2, 7, 6\]",
        ),
        (
            {"accumulate_into": numbers(2, 7, 7, dtype=torch.float16)},
            TypeError,
            "accumulate_into must be torch.float32, but is torch.float16$",
        ),
        (
            {"accumulate_into": numbers(2, 7, 7).transpose(1, 2)},
            ValueError,
            r"accumulate_into must be contiguous, but has strides \(49, 1, 7\)$",
        ),
        (
            {"accumulate_into": numbers(2, 7, 7).requires_grad_()},
            ValueError,
            "accumulate_into must not require a gradient of its own; give a detached tensor$",
        ),
        (
            {"accumulate_into": numbers(2, 7, 7), "bias": None},
            ValueError,
            "accumulate_into is for the gradient of bias, which is None; leave it out$",
        ),
        ({"impl": "nonsense"}, ImplUnavailable, "available: auto, reference, sdpa, xformers, flex, triton"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(change, error, message):
    arguments = {name: numbers(2, 2, NUM_TOKENS, 8) for name in "qkv"} | {"bias": numbers(2, NUM_TOKENS, NUM_TOKENS)}
    with pytest.raises(error, match=message):
        attention(**arguments | change)


def test_a_parameter_as_bias_leaves_queries_without_a_key_too_where_no_gradient_is_made():
    inputs = inputs_of(2)
    bias = torch.nn.Parameter(with_dead_rows(inputs["bias"]))
    with torch.no_grad():
        assert not rel_pos_attention(inputs["qkv"], bias, impl="reference").unflatten(2, (2, 8))[:, 3, 0].any()
