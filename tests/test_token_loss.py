"""Linear, cross-entropy and accuracy over visual tokens."""

import pytest
import torch
from torch.nn import functional as F

from fused_beit.kernels import token_loss
from fused_beit.kernels.testing import assert_parity, token_loss_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def eager_loss(hidden, weight, bias, targets, label_smoothing=0.0, reduction="mean"):
    """Torch's own loss, and the accuracy by picking rows with a mask; fp32 after the product."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction=reduction)
    hits = logits.argmax(-1) == targets
    return loss, hits.to(loss.dtype) if reduction == "none" else hits[targets != -100].to(loss.dtype).mean()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_is_no_worse_than_eager_torch(dtype, with_bias, reduction, label_smoothing):
    def ours(**inputs):
        return token_loss(**inputs, label_smoothing=label_smoothing, reduction=reduction).loss

    def eager(**inputs):
        return eager_loss(**inputs, label_smoothing=label_smoothing, reduction=reduction)[0]

    inputs = token_loss_inputs(9, 16, 21, num_ignored=3, dtype=dtype)
    assert_parity(ours, eager, inputs if with_bias else inputs | {"bias": None})


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_accuracy_counts_hits_among_the_rows_that_count(reduction):
    inputs = token_loss_inputs(64, 16, 3, num_ignored=20)
    _, accuracy = token_loss(**inputs, reduction=reduction)
    expected = eager_loss(**inputs, reduction=reduction)[1]
    assert 0 < expected.mean() < 1
    assert torch.equal(accuracy, expected)


def test_among_equal_logits_the_lowest_token_is_the_prediction():
    hidden, weight = torch.zeros(2, 4), torch.zeros(5, 4)
    assert token_loss(hidden, weight, None, torch.tensor([0, 1]), reduction="none").accuracy.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_no_row_that_counts_gives_zero_loss_zero_accuracy_and_zero_gradients(reduction, label_smoothing):
    inputs = token_loss_inputs(4, 8, 5, num_ignored=4)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    loss, accuracy = token_loss(**inputs, label_smoothing=label_smoothing, reduction=reduction)
    assert not loss.any()
    assert not accuracy.any()
    for grad in torch.autograd.grad(loss.sum(), leaves):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_no_rows_at_all_give_zero():
    assert token_loss(**token_loss_inputs(0, 8, 5)).loss.item() == 0


def test_an_ignored_row_changes_nothing():
    inputs = token_loss_inputs(6, 8, 5, num_ignored=2)
    fewer = {name: inputs[name][:4] if name in ("hidden", "targets") else inputs[name] for name in inputs}
    for with_ignored, without in zip(token_loss(**inputs), token_loss(**fewer), strict=True):
        torch.testing.assert_close(with_ignored, without)


def test_ignore_index_may_be_a_token():
    inputs = token_loss_inputs(64, 8, 3)
    loss, accuracy = token_loss(**inputs, ignore_index=1)
    inputs["targets"] = inputs["targets"].where(inputs["targets"] != 1, -100)
    expected = eager_loss(**inputs)
    torch.testing.assert_close((loss, accuracy), expected)


def test_accuracy_has_no_gradient():
    inputs = token_loss_inputs(4, 8, 5)
    inputs["hidden"].requires_grad_()
    loss, accuracy = token_loss(**inputs)
    assert loss.requires_grad
    assert not accuracy.requires_grad


def test_loss_is_fp32_for_half_precision_and_float64_for_float64():
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        assert [t.dtype for t in token_loss(**token_loss_inputs(4, 8, 5, dtype=dtype))] == [expected, expected]


def test_under_autocast_it_equals_bf16_inputs_and_grads_keep_the_parameters_dtype():
    inputs = token_loss_inputs(6, 8, 5)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    with torch.autocast("cpu", torch.bfloat16):
        loss, accuracy = token_loss(**inputs)
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    assert torch.equal(loss, token_loss(**half).loss)
    assert (loss.dtype, accuracy.dtype) == (torch.float32, torch.float32)
    assert [grad.dtype for grad in torch.autograd.grad(loss, leaves)] == [torch.float32] * 3


def test_extreme_logits_stay_finite():
    inputs = token_loss_inputs(6, 8, 5)
    hidden = (1e4 * inputs.pop("hidden")).requires_grad_()
    loss, _ = token_loss(hidden, **inputs)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_pass_gradcheck(reduction):
    inputs = token_loss_inputs(5, 4, 6, num_ignored=1, dtype=torch.float64)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]

    def loss(hidden, weight, bias):
        return token_loss(hidden, weight, bias, inputs["targets"], label_smoothing=0.1, reduction=reduction).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_passes_opcheck():
    inputs = token_loss_inputs(5, 4, 6, num_ignored=1)
    inputs["hidden"].requires_grad_()
    arguments = (*inputs.values(), 0.1, -100, "mean", "reference")
    torch.library.opcheck(torch.ops.fused_beit.token_loss.default, arguments)


def test_compiles_without_a_graph_break():
    # A graph break is also what a wait for the device (a Python number from a tensor) would cause.
    torch.compiler.reset()
    compiled = torch.compile(token_loss, fullgraph=True, backend="aot_eager")
    assert_parity(compiled, token_loss, token_loss_inputs(6, 8, 5, num_ignored=2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 8)}, ValueError, r"hidden must have shape \[R, D\], but has \[2, 3, 8\]"),
        ({"weight": torch.zeros(8, 5)}, ValueError, r"weight must have shape \[V, 8\], but has \[8, 5\]"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \[5\], but has \[8\]"),
        ({"targets": torch.zeros(5).long()}, ValueError, r"targets must have shape \[6\], but has \[5\]"),
        ({"targets": torch.zeros(6)}, TypeError, r"targets must be torch.int64, but is torch.float32"),
        ({"reduction": "sum"}, ValueError, r"reduction must be 'mean' or 'none', but is 'sum'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in 0..1, but is 1.5"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(change, error, message):
    with pytest.raises(error, match=message):
        token_loss(**token_loss_inputs(6, 8, 5) | change)
