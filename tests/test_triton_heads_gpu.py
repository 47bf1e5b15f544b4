"""token_loss and nearest_code compiled, at the sizes of BEiT, in bf16: `make test-gpu`."""

import pytest
import torch

from fused_beit.kernels import nearest_code, token_loss, token_loss_plan
from fused_beit.kernels.testing import (
    assert_no_worse_than_eager,
    nearest_code_inputs,
    outputs_and_grads,
    token_loss_inputs,
)

pytestmark = pytest.mark.gpu

# Names, so that a dry run in the interpreter can set smaller ones.
DEVICE = "cuda"
HALF = torch.bfloat16
NUM_ROWS, WIDTH, VOCAB_SIZE = 9600, 768, 8192
SEARCHES = [(6272, 2048, 8192), (25088, 32, 8192), (77, 100, 1001)]
RUNS = 100


def loss_of(impl, **options):
    return lambda hidden, weight, bias, targets: token_loss(
        hidden, weight, bias, targets, impl=impl, label_smoothing=0.1, **options
    )


def loss_inputs(num_rows=None, vocab_size=None, dtype=None):
    rows = num_rows or NUM_ROWS
    return token_loss_inputs(
        rows, WIDTH, vocab_size or VOCAB_SIZE, num_ignored=rows // 10, dtype=dtype or HALF, device=DEVICE
    )


def assert_right(function, reference, inputs, *, by_rows=True):
    """The rule of fused_beit.kernels.testing, of every gradient and, row by row, of the loss.

    Of a mean the roundings of eager torch may cancel, and then nothing is no worse.
    """
    wide = {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    found, eager, exact = (
        outputs_and_grads(call, given) for call, given in ((function, inputs), (reference, inputs), (reference, wide))
    )
    assert found.keys() == exact.keys()
    left_out = {"output 1"} if by_rows else {"output 0", "output 1"}  # 1: a rounding may turn one token into another
    for name in exact.keys() - left_out:
        assert_no_worse_than_eager(name, found[name], eager[name], exact[name])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32], ids=str)
def test_the_loss_and_its_gradients_are_no_worse_than_eager_torch(dtype, reduction):
    ours, reference = (loss_of(impl, reduction=reduction) for impl in ("triton", "reference"))
    assert_right(ours, reference, loss_inputs(dtype=dtype), by_rows=reduction == "none")


@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32], ids=str)
def test_the_mean_is_that_of_the_rows(dtype):
    inputs = loss_inputs(dtype=dtype)
    mean, rows = (loss_of("triton", reduction=reduction)(**inputs).loss for reduction in ("mean", "none"))
    counted = (inputs["targets"] >= 0).sum()
    torch.testing.assert_close(mean.double(), rows.double().sum() / counted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab_size", [1, 1000, 8191, 16385])
def test_vocabularies_of_every_size_are_no_worse_than_eager_torch(vocab_size):
    ours, reference = (loss_of(impl, reduction="none") for impl in ("triton", "reference"))
    assert_right(ours, reference, loss_inputs(num_rows=300, vocab_size=vocab_size))


def test_the_loss_compiles_without_a_graph_break():
    torch.compiler.reset()
    ours, reference = (loss_of(impl, reduction="none") for impl in ("triton", "reference"))
    assert_right(torch.compile(ours, fullgraph=True), reference, loss_inputs(num_rows=300))


def test_the_loss_gives_the_same_bits_in_every_run():
    inputs = loss_inputs()
    expected = outputs_and_grads(loss_of("triton"), inputs)
    for _ in range(RUNS):
        found = outputs_and_grads(loss_of("triton"), inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_loss_takes_no_more_memory_than_its_plan_says():
    inputs = loss_inputs()
    outputs_and_grads(loss_of("triton"), inputs)  # cuBLAS takes its workspace
    leaves = [inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    plan = token_loss_plan(NUM_ROWS, WIDTH, VOCAB_SIZE, HALF)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = loss_of("triton")(*leaves, inputs["targets"]).loss
    # The allocator rounds every tensor up to 2 MiB at most, of which there are some ten.
    assert torch.cuda.max_memory_allocated() - before <= plan.extra_bytes + 20 * 2**20
    assert plan.extra_bytes <= 200e6
    loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_and_its_backward_are_captured_in_a_graph(reduction):
    inputs = loss_inputs(num_rows=300)
    leaves = [inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]

    def step():
        loss, _ = loss_of("triton", reduction=reduction)(*leaves, inputs["targets"])
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    assert_captured(step)


def assert_captured(step):
    """That a CUDA graph of `step`, replayed, gives the bits of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    # Detached: a result that is kept keeps the nodes of the leaves on this stream, and the capture would wait for it.
    expected = [tensor.detach().clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for tensor in found:
        tensor.detach().zero_()
    graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_rows", "width", "num_codes"), SEARCHES)
def test_the_best_code_is_no_worse_than_eager_torch(num_rows, width, num_codes, dtype):
    inputs = nearest_code_inputs(num_rows, width, num_codes, dtype=dtype, device=DEVICE)
    found, eager = nearest_code(**inputs, impl="triton"), by_tensor_cores(**inputs)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    exact = nearest_code(**wide, impl="reference")
    assert_no_worse_than_eager("score", found.score, eager, exact.score)
    # The true score of the code that was found: where two are equal but for a rounding, either is right.
    chosen = (wide["x"] * wide["codes"][found.index]).sum(-1) + wide["bias"][found.index]
    assert_no_worse_than_eager("score of the code", chosen.float(), eager, exact.score)


def by_tensor_cores(x, codes, bias):
    """The best scores by torch's product on the units that ours takes, whose sums keep fewer digits than fp32's.

    The reference multiplies in fp32, in half precision too.
    """
    if x.dtype is torch.float32 or not x.is_cuda:
        return nearest_code(x, codes, bias, impl="reference").score
    return (torch.mm(x, codes.t(), out_dtype=torch.float32) + bias.float()).max(dim=-1).values


@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32], ids=str)
def test_a_row_alone_gives_the_bits_that_it_gives_among_others(dtype):
    inputs = nearest_code_inputs(300, 2048, 8192, dtype=dtype, device=DEVICE)
    among = nearest_code(**inputs, impl="triton")
    alone = nearest_code(**inputs | {"x": inputs["x"][:1]}, impl="triton")
    assert torch.equal(alone.score, among.score[:1])
    assert torch.equal(alone.index, among.index[:1])


def test_the_lowest_index_wins_ties():
    codes = torch.ones(8192, 64, dtype=HALF, device=DEVICE)
    assert not nearest_code(torch.ones(300, 64, dtype=HALF, device=DEVICE), codes, impl="triton").index.any()


def test_the_first_nan_wins_over_everything():
    x, codes = torch.ones(300, 64, dtype=HALF, device=DEVICE), torch.ones(8192, 64, dtype=HALF, device=DEVICE)
    codes[[700, 5000]] = float("nan")
    index, score = nearest_code(x, codes, impl="triton")
    assert (index == 700).all()
    assert score.isnan().all()


def test_the_search_gives_the_same_bits_in_every_run_and_in_a_graph():
    inputs = nearest_code_inputs(6272, 2048, 8192, dtype=HALF, device=DEVICE)

    def step():
        return nearest_code(**inputs, impl="triton")

    expected = step()
    for _ in range(RUNS):
        found = step()
        assert torch.equal(found.index, expected.index)
        assert torch.equal(found.score, expected.score)
    assert_captured(step)


def test_the_search_keeps_no_product():
    inputs = nearest_code_inputs(25088, 32, 8192, dtype=HALF, device=DEVICE)
    nearest_code(**inputs, impl="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest_code(**inputs, impl="triton")
    assert torch.cuda.max_memory_allocated() - before < 16 * 2**20 < 25088 * 8192 * 2
