"""The Triton loss, in Triton's interpreter: it equals the reference, and holds no more logits than it says."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from triton_families import NEEDS_INTERPRETER

from fused_beit.kernels import ImplUnavailable, token_loss, token_loss_plan
from fused_beit.kernels.testing import assert_parity, outputs_and_grads, token_loss_inputs
from fused_beit.kernels.token_loss import launch, plan

pytestmark = NEEDS_INTERPRETER

# bf16 is not here: the interpreter computes it wrongly.
DTYPES = [torch.float32, torch.float16]
LEARNED = ("hidden", "weight", "bias")


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of 16 tokens and chunks of 3 rows of at most 32 tokens in fp32, so that little makes many of both."""
    monkeypatch.setattr(launch, "LARGEST_BLOCK", 16)
    monkeypatch.setattr(plan, "LOGITS_BYTES", 3 * 32 * 4)


def ours(hidden, weight, bias, targets, **options):
    return token_loss(hidden, weight, bias, targets, impl="triton", **options)


def reference(hidden, weight, bias, targets, **options):
    return token_loss(hidden, weight, bias, targets, impl="reference", **options)


def both(inputs, **options):
    """Outputs and gradients of ours and of the reference."""
    found = outputs_and_grads(lambda **given: ours(**given, **options), inputs)
    return found, outputs_and_grads(lambda **given: reference(**given, **options), inputs)


def leaves_of(inputs):
    return [inputs[name].clone().requires_grad_() for name in LEARNED]


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_accuracy_and_gradients_are_no_worse_than_eager_torch(dtype, with_bias, reduction, label_smoothing):
    inputs = token_loss_inputs(9, 16, 21, num_ignored=3, dtype=dtype) | ({} if with_bias else {"bias": None})
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    assert_parity(lambda **given: ours(**given, **options), lambda **given: reference(**given, **options), inputs)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab_size", [1, 2, 16, 17, 37])
def test_in_float64_it_equals_the_reference_block_by_block_and_chunk_by_chunk(
    small_tiles, vocab_size, reduction, label_smoothing
):
    inputs = token_loss_inputs(8, 5, vocab_size, num_ignored=2, dtype=torch.float64)
    found, expected = both(inputs, reduction=reduction, label_smoothing=label_smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_number_of_rows_equals_the_reference(small_tiles, reduction, num_rows):
    found, expected = both(token_loss_inputs(num_rows, 5, 17, dtype=torch.float64), reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_over_many_chunks_is_no_worse_than_eager_torch(small_tiles, dtype):
    assert_parity(ours, reference, token_loss_inputs(33, 16, 21, num_ignored=3, dtype=dtype))


def test_accuracy_counts_hits_among_the_rows_that_count(small_tiles):
    inputs = token_loss_inputs(64, 16, 3, num_ignored=20)
    accuracy = ours(**inputs).accuracy
    assert 0 < accuracy < 1
    assert torch.equal(accuracy, reference(**inputs).accuracy)


def test_among_equal_logits_the_lowest_token_is_the_prediction(small_tiles):
    # The same logits in the first, a middle and the last block of 16.
    hidden, targets = torch.zeros(4, 4), torch.tensor([0, 1, 16, 39])
    assert ours(hidden, torch.zeros(40, 4), None, targets, reduction="none").accuracy.tolist() == [1, 0, 0, 0]


def test_logits_that_grow_or_fall_from_block_to_block_equal_the_reference(small_tiles):
    for slope in (30.0, -30.0):
        bias = torch.arange(40, dtype=torch.float64) * slope
        found, expected = both(token_loss_inputs(3, 4, 40, dtype=torch.float64) | {"bias": bias}, label_smoothing=0.1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_logits_with_a_large_offset_lose_no_digits():
    inputs = token_loss_inputs(4, 8, 21)
    inputs["bias"] = inputs["bias"] + 1e5
    assert_parity(
        lambda **given: ours(**given, label_smoothing=0.1),
        lambda **given: reference(**given, label_smoothing=0.1),
        inputs,
    )


def test_extreme_logits_stay_finite():
    inputs = token_loss_inputs(6, 8, 21) | {"bias": None}
    inputs["hidden"] = 1e4 * inputs["hidden"]
    assert all(tensor.isfinite().all() for tensor in outputs_and_grads(ours, inputs).values())


def test_tokens_that_a_bias_of_minus_infinity_forbids_equal_the_reference(small_tiles):
    inputs = token_loss_inputs(4, 4, 40, dtype=torch.float64)
    inputs["bias"][:17] = float("-inf")  # the whole first block
    inputs["targets"] = torch.tensor([17, 20, 39, 30])
    found, expected = both(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_no_row_that_counts_gives_zero_loss_zero_accuracy_and_zero_gradients(reduction, label_smoothing):
    inputs = token_loss_inputs(4, 8, 5, num_ignored=4)
    found, _ = both(inputs, label_smoothing=label_smoothing, reduction=reduction)
    assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ignored_row_gets_no_gradient(reduction):
    found, _ = both(token_loss_inputs(6, 8, 5, num_ignored=2), label_smoothing=0.1, reduction=reduction)
    assert not found["grad hidden"][4:].any()
    assert found["grad hidden"][:4].any(1).all()


def test_ignore_index_may_be_a_token():
    inputs = token_loss_inputs(64, 8, 3, dtype=torch.float64)
    found, expected = both(inputs, ignore_index=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("target", [-1, 5, 2**40])
def test_a_target_that_is_no_token_gives_nan(target):
    inputs = token_loss_inputs(3, 8, 5)
    inputs["targets"][1] = target
    loss, accuracy = ours(**inputs, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert accuracy[1] == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_only_the_gradients_asked_for_are_made(monkeypatch, wanted, reduction):
    made = []
    chunks = launch.token_loss_chunks

    def noted(*arguments, **options):
        made.extend(name for name, grad in zip(LEARNED, arguments[-1], strict=True) if grad is not None)
        chunks(*arguments, **options)

    monkeypatch.setattr(launch, "token_loss_chunks", noted)
    inputs = token_loss_inputs(5, 4, 6, dtype=torch.float64)
    leaves = {name: inputs[name].clone().requires_grad_(name in wanted) for name in LEARNED}
    found, expected = (
        torch.autograd.grad(
            function(**leaves, targets=inputs["targets"], reduction=reduction).loss.sum(),
            [leaves[name] for name in wanted],
        )
        for function in (ours, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert made == list(wanted)


def test_without_gradients_none_is_made(monkeypatch):
    inputs = token_loss_inputs(5, 4, 6)
    leaves = leaves_of(inputs)
    expected = ours(*leaves, inputs["targets"]).loss
    monkeypatch.setattr(launch, "add_product", None)
    with torch.no_grad():
        loss = ours(*leaves, inputs["targets"]).loss
    assert not loss.requires_grad
    assert torch.equal(loss, expected)


def test_a_backward_may_be_run_twice_with_any_factor():
    inputs = token_loss_inputs(5, 4, 6, dtype=torch.float64)
    leaves = leaves_of(inputs)
    loss = ours(*leaves, inputs["targets"]).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, leaves)
    torch.testing.assert_close([3 * grad for grad in once], list(thrice), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_pass_gradcheck(small_tiles, reduction):
    inputs = token_loss_inputs(5, 4, 20, num_ignored=1, dtype=torch.float64)

    def loss(hidden, weight, bias):
        return ours(hidden, weight, bias, inputs["targets"], label_smoothing=0.1, reduction=reduction).loss

    assert torch.autograd.gradcheck(loss, leaves_of(inputs), fast_mode=True)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_its_operator_passes_opcheck(mean, with_bias):
    inputs = token_loss_inputs(5, 4, 6, num_ignored=1)
    hidden, weight, bias = leaves_of(inputs)
    arguments = (
        hidden,
        weight,
        bias if with_bias else None,
        inputs["targets"],
        0.1,
        -100,
        mean,
        [True, True, with_bias],
    )
    torch.library.opcheck(torch.ops.fused_beit.token_loss_fwd.default, arguments)


def test_the_operators_of_its_backward_pass_opcheck():
    inputs = token_loss_inputs(5, 4, 6, num_ignored=1)
    arguments = (torch.randn(5), *inputs.values(), 0.1, -100, [True, False, True])
    torch.library.opcheck(torch.ops.fused_beit.token_loss_bwd.default, arguments)
    arguments = (torch.randn(5, 4), torch.tensor(2.0), torch.tensor(4), torch.float16)
    torch.library.opcheck(torch.ops.fused_beit.token_loss_scale.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction, backend):
    torch.compiler.reset()

    def loss(**inputs):
        return ours(**inputs, reduction=reduction)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    inputs = token_loss_inputs(6, 8, 5, num_ignored=2)
    assert equal(outputs_and_grads(compiled, inputs), outputs_and_grads(loss, inputs))


def test_under_autocast_it_equals_half_precision_and_sums_the_weights_gradient_in_fp32():
    inputs = token_loss_inputs(6, 8, 5)
    leaves = leaves_of(inputs)
    with torch.autocast("cpu", torch.float16):  # bf16 is what the interpreter cannot do
        loss = ours(*leaves, inputs["targets"]).loss
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    assert torch.equal(loss, ours(**half).loss)
    grads = torch.autograd.grad(loss, leaves)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    assert not torch.equal(grads[1], grads[1].half().float())


def test_checkpointing_changes_no_bit(small_tiles):
    inputs = token_loss_inputs(6, 8, 21)

    def loss(**given):
        return checkpoint(ours, *given.values(), use_reentrant=False)

    assert equal(outputs_and_grads(loss, inputs), outputs_and_grads(ours, inputs))


def test_two_runs_give_the_same_bits(small_tiles):
    inputs = token_loss_inputs(9, 8, 21)
    assert equal(outputs_and_grads(ours, inputs), outputs_and_grads(ours, inputs))


def test_a_gradient_of_a_gradient_is_refused():
    inputs = token_loss_inputs(4, 8, 5)
    hidden, weight, bias = leaves_of(inputs)
    (grad,) = torch.autograd.grad(ours(hidden, weight, bias, inputs["targets"]).loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="token_loss: impl='triton' has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_inputs_may_have_any_strides(name):
    inputs = token_loss_inputs(5, 4, 6, dtype=torch.float64)
    whole = outputs_and_grads(ours, inputs)
    inputs[name] = inputs[name].t().contiguous().t()
    torch.testing.assert_close(outputs_and_grads(ours, inputs), whole, rtol=1e-12, atol=1e-13)


def test_bf16_is_refused_in_the_interpreter():
    with pytest.raises(ImplUnavailable, match=r"token_loss: impl='triton'.*computes bfloat16 wrongly"):
        ours(**token_loss_inputs(4, 8, 5, dtype=torch.bfloat16))


def test_no_more_logits_are_held_than_the_plan_says(monkeypatch, small_tiles):
    held = []
    loss = launch.launch_loss

    def noted(logits, *others):
        held.append((len(logits), logits.data_ptr(), logits.untyped_storage().nbytes()))
        loss(logits, *others)

    monkeypatch.setattr(launch, "launch_loss", noted)
    inputs = token_loss_inputs(10, 4, 21)
    outputs_and_grads(ours, inputs)
    num_rows, addresses, num_bytes = zip(*held, strict=True)
    found = token_loss_plan(10, 4, 21, torch.float32)
    assert num_rows == (3, 3, 3, 1)
    assert len(set(addresses)) == 1
    assert set(num_bytes) == {found.logits_bytes} == {plan.LOGITS_BYTES}


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(9600, 8192), (1, 8192), (9600, 65536), (100, 10**8), (0, 8)])
def test_the_plan_covers_all_rows_within_the_documented_bytes(num_rows, vocab_size):
    found = token_loss_plan(num_rows, 768, vocab_size, torch.bfloat16)
    assert found.rows_a_chunk * found.num_chunks >= num_rows
    assert found.logits_bytes <= plan.LOGITS_BYTES or found.rows_a_chunk == 1


def test_the_plan_says_what_a_call_holds():
    text = str(token_loss_plan(9600, 768, 8192, torch.bfloat16, weight_dtype=torch.float32))
    assert text == (
        "3 chunks of 3200 rows, 105.0 MB beside the inputs: logits 52.4 MB, gradient of hidden 14.7 MB, "
        "of weight and bias 25.2 MB, weight cast 12.6 MB"
    )


@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129, 300])
def test_the_sum_of_rows_is_that_of_all_rows(num_rows):
    padded = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(0))
    found = launch.sum_of_rows(padded[:, :10], torch.float64)
    torch.testing.assert_close(found, padded[:, :10].double().sum(0))
