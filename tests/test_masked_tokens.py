"""Mask tokens into the encoder, masked rows out of it."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from triton_families import NEEDS_INTERPRETER

from fused_beit.kernels import embed_tokens, gather_masked
from fused_beit.kernels.testing import (
    assert_parity,
    embed_tokens_inputs,
    gather_masked_inputs,
    masked_positions,
    outputs_and_grads,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def embed_by_loops(patches, mask_token, cls_token, pos_embed, masked_positions):
    """Patch by patch, from the definition."""
    rows = []
    for b in range(patches.shape[0]):
        masked = set() if masked_positions is None else set(masked_positions[b].tolist())
        row = [cls_token] + [mask_token if p in masked else patches[b, p] for p in range(patches.shape[1])]
        rows.append(torch.stack(row) + (0 if pos_embed is None else pos_embed))
    return torch.stack(rows)


def gather_by_loops(x, masked_positions, weight, bias, eps=1e-6, num_prefix_tokens=1):
    """Norm all tokens, or leave them as they are, then take the rows one at a time."""
    normed = x if weight is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    zeros = torch.zeros_like(normed[0, 0])
    positions = masked_positions.tolist()
    return torch.stack(
        [zeros if p < 0 else normed[b, num_prefix_tokens + p] for b, ps in enumerate(positions) for p in ps]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "without", [(), ("pos_embed",), ("masked_positions",), ("pos_embed", "masked_positions")], ids=str
)
def test_embed_equals_the_definition_written_as_loops(dtype, without):
    inputs = embed_tokens_inputs(2, 6, 8, 3, num_padding=2, dtype=dtype) | dict.fromkeys(without)
    assert_parity(embed_tokens, embed_by_loops, inputs)


def test_the_mask_token_replaces_the_patch_before_the_position_is_added():
    inputs = embed_tokens_inputs(1, 4, 8, 1)
    position = inputs["masked_positions"].item()
    out = embed_tokens(**inputs)
    assert torch.equal(out[0, 1 + position], inputs["mask_token"] + inputs["pos_embed"][1 + position])


def test_a_masked_patch_gets_no_gradient_and_padding_masks_nothing():
    inputs = embed_tokens_inputs(2, 5, 8, 0, num_padding=3)
    patches = inputs["patches"].requires_grad_()
    inputs["masked_positions"][1, 0] = 4
    embed_tokens(**inputs).sum().backward()
    expected = torch.ones(2, 5, 8)
    expected[1, 4] = 0
    assert torch.equal(patches.grad, expected)


def test_embed_keeps_fp32_parameters_in_fp32_when_autocast_made_the_patches_bf16():
    inputs = embed_tokens_inputs(2, 5, 8, 2)
    inputs["patches"] = inputs["patches"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = embed_tokens(**inputs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, embed_by_loops(**inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_padding", [0, 2])
@pytest.mark.parametrize("without", [(), ("weight", "bias")], ids=str)
def test_gather_equals_the_definition_written_as_loops(dtype, num_padding, without):
    inputs = gather_masked_inputs(3, 7, 8, 2, num_padding=num_padding, dtype=dtype) | dict.fromkeys(without)
    assert_parity(gather_masked, gather_by_loops, inputs)


def test_gather_counts_positions_from_after_the_prefix():
    inputs = gather_masked_inputs(2, 7, 8, 3, dtype=torch.float64)
    inputs["masked_positions"] = masked_positions(2, 5, 3)
    for given in (inputs, inputs | dict.fromkeys(("weight", "bias"))):
        out = gather_masked(**given, num_prefix_tokens=2, eps=0.5)
        torch.testing.assert_close(out, gather_by_loops(**given, num_prefix_tokens=2, eps=0.5))


def test_padding_gives_zeros_and_no_gradient():
    inputs = gather_masked_inputs(2, 5, 8, 0, num_padding=3)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    out = gather_masked(**inputs)
    assert out.shape == (6, 8)
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert not grad.any()
    rows = gather_masked(inputs["x"], inputs["masked_positions"], None, None)
    assert not rows.any()
    assert not torch.autograd.grad(rows.sum(), inputs["x"])[0].any()


def test_gather_under_autocast_gives_the_linears_dtype_from_fp32_statistics():
    inputs = gather_masked_inputs(2, 5, 64, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = gather_masked(**inputs)
    assert torch.equal(out, gather_masked(**inputs).bfloat16())


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=NEEDS_INTERPRETER)])
def test_gather_takes_a_layer_norm_without_bias(impl):
    inputs = gather_masked_inputs(2, 5, 12, 2, num_padding=1, dtype=torch.float64)
    positions = inputs.pop("masked_positions")

    def run(impl, **given):
        return gather_masked(masked_positions=positions, **given, impl=impl)

    found = outputs_and_grads(partial(run, impl), inputs | {"bias": None})
    expected = outputs_and_grads(partial(run, "reference"), inputs | {"bias": torch.zeros(12, dtype=torch.float64)})
    del expected["grad bias"]
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=NEEDS_INTERPRETER)])
def test_gather_takes_rows_without_channels(impl):
    inputs = gather_masked_inputs(2, 5, 0, 3)
    assert gather_masked(**inputs, impl=impl).shape == (6, 0)


def test_rows_that_are_not_normed_stay_in_their_dtype_under_autocast():
    x, positions, *_ = gather_masked_inputs(2, 5, 64, 2).values()
    with torch.autocast("cpu", torch.bfloat16):
        assert gather_masked(x, positions, None, None).dtype == torch.float32
        assert gather_masked(x.half(), positions, None, None).dtype == torch.float16


def test_gather_takes_bf16_rows_with_fp32_parameters():
    inputs = gather_masked_inputs(2, 5, 64, 2)
    inputs["x"] = inputs["x"].bfloat16()
    out = gather_masked(**inputs)
    assert torch.equal(out, gather_masked(**inputs | {"x": inputs["x"].float()}).bfloat16())


def test_gradients_pass_gradcheck():
    inputs = embed_tokens_inputs(2, 4, 3, 2, num_padding=1, dtype=torch.float64)
    leaves = [inputs[name].requires_grad_() for name in ("patches", "mask_token", "cls_token", "pos_embed")]
    assert torch.autograd.gradcheck(lambda *args: embed_tokens(*args, inputs["masked_positions"]), leaves)
    inputs = gather_masked_inputs(2, 4, 3, 2, num_padding=1, dtype=torch.float64)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda x, w, b: gather_masked(x, inputs["masked_positions"], w, b), leaves)
    assert torch.autograd.gradcheck(lambda x: gather_masked(x, inputs["masked_positions"], None, None), leaves[:1])


def test_both_pass_opcheck():
    inputs = embed_tokens_inputs(2, 4, 8, 2, num_padding=1)
    inputs["patches"].requires_grad_()
    torch.library.opcheck(torch.ops.fused_beit.embed_tokens.default, (*inputs.values(), "reference"))
    inputs = gather_masked_inputs(2, 4, 8, 2, num_padding=1)
    inputs["x"].requires_grad_()
    for given in (inputs, inputs | dict.fromkeys(("weight", "bias"))):
        torch.library.opcheck(torch.ops.fused_beit.gather_masked.default, (*given.values(), 1e-6, 1, "reference"))


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (embed_tokens, embed_tokens_inputs(2, 4, 8, 2, num_padding=1)),
        (gather_masked, gather_masked_inputs(2, 4, 8, 2, num_padding=1)),
        (gather_masked, gather_masked_inputs(2, 4, 8, 2, num_padding=1) | dict.fromkeys(("weight", "bias"))),
    ],
)
def test_both_compile_without_a_graph_break(function, inputs):
    torch.compiler.reset()
    assert_parity(torch.compile(function, fullgraph=True, backend="aot_eager"), function, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patches": torch.zeros(2, 32)}, ValueError, r"patches must have shape \[B, P, D\], but has \[2, 32\]"),
        ({"mask_token": torch.zeros(1, 1, 8)}, ValueError, r"mask_token must have shape \[8\], but has \[1, 1, 8\]"),
        ({"cls_token": torch.zeros(7)}, ValueError, r"cls_token must have shape \[8\], but has \[7\]"),
        ({"pos_embed": torch.zeros(4, 8)}, ValueError, r"pos_embed must have shape \[5, 8\], but has \[4, 8\]"),
        ({"masked_positions": torch.zeros(1, 2).long()}, ValueError, r"masked_positions must have shape \[2, M\]"),
        ({"masked_positions": torch.zeros(2, 2).int()}, TypeError, r"must be torch.int64, but is torch.int32"),
        ({"masked_positions": torch.zeros(2, 4).bool()}, TypeError, r"must be torch.int64, but is torch.bool"),
        ({"masked_positions": torch.tensor([[0, -1], [2, 2]])}, ValueError, r"lists 2 of picture 1 twice"),
        ({"masked_positions": torch.tensor([[0, -1], [2, 4]])}, ValueError, r"-1 or in 0..3, but one is 4"),
    ],
)
def test_embed_refuses_wrong_arguments_with_what_was_expected(change, error, message):
    with pytest.raises(error, match=message):
        embed_tokens(**embed_tokens_inputs(2, 4, 8, 2) | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"masked_positions": torch.zeros(4).long()}, ValueError, r"masked_positions must have shape \[2, M\]"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight must have shape \[8\], but has \[7\]"),
        ({"weight": None}, ValueError, r"without weight there is none; give a weight too"),
        ({"masked_positions": torch.tensor([[0, 0], [1, 2]])}, ValueError, r"lists 0 of picture 0 twice"),
        ({"masked_positions": torch.tensor([[0, 1], [1, 3]])}, ValueError, r"-1 or in 0..2, but one is 3"),
        ({"num_prefix_tokens": 4}, ValueError, r"num_prefix_tokens must be .* less than the 4 tokens of x, but is 4"),
    ],
)
def test_gather_refuses_wrong_arguments_with_what_was_expected(change, error, message):
    with pytest.raises(error, match=message):
        gather_masked(**gather_masked_inputs(2, 4, 8, 2) | change)
