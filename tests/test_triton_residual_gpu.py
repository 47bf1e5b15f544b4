"""The Triton residual_norm and residual_add compiled, at the sizes of BEiT, in bf16 and fp16: `make test-gpu`."""

import pytest
import torch

from fused_beit.kernels import residual_add, residual_norm
from fused_beit.kernels.testing import assert_parity, outputs_and_grads, residual_norm_inputs

pytestmark = pytest.mark.gpu

# Names, so that a dry run in the interpreter can set smaller ones.
DEVICE = "cuda"
HALF = torch.bfloat16
HALVES = [torch.bfloat16, torch.float16]
BATCH, NUM_TOKENS, WIDTH = 128, 197, 768
WIDTHS = [64, 192, 384, 1000, 1024, 1408]
FEW = 8  # pictures, where more would show no more
RUNS = 100
MIB = 2**20


def inputs_of(batch=None, num_tokens=None, width=None, *, stream=None, branch=None, seed=0):
    """x in `stream`, y in `branch`, parameters and keep in fp32, as a model under autocast has them."""
    shape = (batch or FEW, num_tokens or NUM_TOKENS, width or WIDTH)
    inputs = residual_norm_inputs(*shape, device=DEVICE, seed=seed)
    return inputs | {"x": inputs["x"].to(stream or HALF), "y": inputs["y"].to(branch or HALF)}


def with_keep(inputs, impl, operator=residual_norm):
    """The operator with the keep of these inputs, which has no gradient; and the inputs that have one."""
    names = [name for name in inputs if name != "keep" and (operator is residual_norm or name in ("x", "y", "gamma"))]

    def run(**given):
        keep = inputs["keep"]
        return operator(**given, keep=keep.to(torch.promote_types(keep.dtype, given["x"].dtype)), impl=impl)

    return run, {name: inputs[name] for name in names}


def assert_right(inputs, operator=residual_norm):
    ours, leaves = with_keep(inputs, "triton", operator)
    reference, _ = with_keep(inputs, "reference", operator)
    assert_parity(ours, reference, leaves)


def results(inputs, operator=residual_norm):
    ours, leaves = with_keep(inputs, "triton", operator)
    return outputs_and_grads(ours, leaves)


@pytest.mark.parametrize("operator", [residual_norm, residual_add])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_no_worse_than_eager_torch(dtype, operator):
    assert_right(inputs_of(BATCH, stream=dtype, branch=dtype), operator)


@pytest.mark.parametrize("operator", [residual_norm, residual_add])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_fp32_stream_with_a_narrower_branch_is_no_worse_than_eager_torch(dtype, operator):
    assert_right(inputs_of(stream=torch.float32, branch=dtype), operator)


def test_fp32_is_no_worse_than_eager_torch():
    assert_right(inputs_of(stream=torch.float32, branch=torch.float32))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_is_no_worse_than_eager_torch(width):
    assert_right(inputs_of(width=width))


@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 1), (1, 197), (7, 1), (3, 577)])
def test_any_number_of_rows_is_no_worse_than_eager_torch(batch, num_tokens):
    assert_right(inputs_of(batch, num_tokens))


@pytest.mark.parametrize("without", [("gamma",), ("keep",), ("gamma", "keep")], ids=str)
def test_without_gamma_or_keep_it_is_no_worse_than_eager_torch(without):
    inputs = inputs_of() | dict.fromkeys(without)
    leaves = {name: tensor for name, tensor in inputs.items() if name != "keep"}

    def run(impl):
        return lambda **given: residual_norm(
            **given, keep=None if inputs["keep"] is None else inputs["keep"].to(given["weight"].dtype), impl=impl
        )

    assert_parity(run("triton"), run("reference"), leaves)


def test_a_dropped_picture_keeps_every_bit():
    inputs = inputs_of()
    inputs["x"][1, 0, :2] = torch.tensor([0.0, -0.0])
    x_new, _ = residual_norm(**inputs, impl="triton")
    assert torch.equal(x_new[1].view(torch.int16), inputs["x"][1].view(torch.int16))


def test_under_autocast_the_stream_stays_fp32_and_the_normed_is_half():
    inputs = inputs_of(stream=torch.float32)
    with torch.autocast(DEVICE, HALF):
        x_new, normed = residual_norm(**inputs, impl="triton")
        expected = residual_norm(**inputs, impl="reference")
    assert (x_new.dtype, normed.dtype) == (torch.float32, HALF)
    torch.testing.assert_close((x_new, normed), expected)


def test_many_runs_give_the_same_bits():
    inputs = inputs_of(BATCH)
    expected = results(inputs)
    for _ in range(RUNS):
        found = results(inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    inputs = inputs_of()
    ours, leaves = with_keep(inputs, "triton")
    reference, _ = with_keep(inputs, "reference")
    assert_parity(torch.compile(ours, fullgraph=True), reference, leaves)


def test_a_cuda_graph_of_forward_and_backward_replays_on_other_inputs():
    first, second = inputs_of(seed=1), inputs_of(seed=2)
    ours, leaves = with_keep(first, "triton")
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    cotangents = [torch.randn_like(leaves["x"]) for _ in range(2)]

    def step():
        outputs = ours(**leaves)
        return (*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile the kernels, which a capture may not
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(second[name])
    graph.replay()
    torch.cuda.synchronize()
    replayed = [tensor.detach().clone() for tensor in captured]
    assert all(torch.equal(found, expected) for found, expected in zip(replayed, step(), strict=True))


def test_it_holds_little_more_than_it_returns():
    """Mean and rstd of each row, and the partial sums of three gradients."""
    inputs = inputs_of(BATCH)
    results(inputs_of(1))  # compiles
    ours, leaves = with_keep(inputs, "triton")
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    cotangents = [torch.ones_like(leaves["x"]) for _ in range(2)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = ours(**leaves)
    returned = (*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents))
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in returned)
    assert extra < 8 * MIB


def test_more_numbers_than_32_bits_count_are_right():
    """The last rows of 2^31 numbers and more equal those rows alone."""
    batch, width = 2**31 // (NUM_TOKENS * 1024) + 2, 1024
    assert batch * NUM_TOKENS * width > 2**31
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.randn(1, NUM_TOKENS, width, device=DEVICE, dtype=HALF).repeat(batch, 1, 1).requires_grad_()
    last = x.detach()[-1:].clone().requires_grad_()
    weight, bias = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    outputs = [residual_norm(given, given, None, None, weight, bias, impl="triton") for given in (x, last)]
    for found, expected in zip(*outputs, strict=True):
        assert torch.equal(found[-1:], expected)
    grads = [
        torch.autograd.grad(normed, given, torch.ones_like(normed))
        for (_, normed), given in zip(outputs, (x, last), strict=True)
    ]
    assert torch.equal(grads[0][0][-1:], grads[1][0])
