"""The Triton operators of masked pictures compiled, at the sizes of BEiT and MAE, in bf16: `make test-gpu`."""

from functools import partial

import pytest
import torch

from fused_beit.kernels import embed_tokens, gather_masked, keep_visible, restore_tokens
from fused_beit.kernels.testing import (
    assert_parity,
    embed_tokens_inputs,
    gather_masked_inputs,
    keep_visible_inputs,
    outputs_and_grads,
    restore_tokens_inputs,
)

pytestmark = pytest.mark.gpu

# Names, so that a dry run in the interpreter can set smaller ones.
DEVICE = "cuda"
HALF = torch.bfloat16
HALVES = [torch.bfloat16, torch.float16]
BATCH, NUM_PATCHES, WIDTH, NUM_MASKED, NUM_VISIBLE = 128, 196, 768, 75, 49
WIDTHS = [64, 192, 384, 1000, 1024, 1408]
FEW = 8  # pictures, where more would show no more
RUNS = 100
MIB = 2**20


def rows_inputs(*shape, **options):
    """x and masked_positions of `gather_masked`, for the rows as they are."""
    made = gather_masked_inputs(*shape, **options)
    return {name: made[name] for name in ("x", "masked_positions")}


OPERATORS = {
    "embed": (embed_tokens, embed_tokens_inputs, "patches"),
    "keep": (keep_visible, keep_visible_inputs, "patches"),
    "restore": (restore_tokens, restore_tokens_inputs, "x"),
    "gather": (gather_masked, gather_masked_inputs, "x"),
    "rows": (partial(gather_masked, weight=None, bias=None), rows_inputs, "x"),
}

every_operator = pytest.mark.parametrize("name", OPERATORS)


def inputs_of(name, batch=None, width=None, *, source=None, num_patches=None, num_padding=3, seed=0):
    """What is moved in `source`, parameters in fp32, as a model under autocast has them."""
    _, make, moved = OPERATORS[name]
    num_patches = num_patches or NUM_PATCHES
    num_tokens = num_patches + 1 if name in ("gather", "rows") else num_patches
    num_listed = min(num_patches, NUM_VISIBLE if name in ("keep", "restore") else NUM_MASKED)
    shape = (batch or FEW, num_tokens, width or WIDTH, num_listed)
    inputs = make(*shape, num_padding=num_padding, device=DEVICE, seed=seed)
    return inputs | {moved: inputs[moved].to(source or HALF)}


def call(name, impl="triton", num_patches=None):
    operator = OPERATORS[name][0]
    options = {"num_patches": num_patches or NUM_PATCHES} if name == "restore" else {}
    return lambda **inputs: operator(**inputs, **options, impl=impl)


def assert_right(name, inputs, num_patches=None):
    assert_parity(call(name, "triton", num_patches), call(name, "reference", num_patches), inputs)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@every_operator
def test_every_dtype_is_no_worse_than_eager_torch(name, dtype):
    assert_right(name, inputs_of(name, BATCH, source=dtype))


@every_operator
def test_parameters_in_half_precision_are_no_worse_than_eager_torch(name):
    inputs = inputs_of(name)
    floats = {key: tensor for key, tensor in inputs.items() if tensor.is_floating_point()}
    assert_right(name, inputs | {key: tensor.to(HALF) for key, tensor in floats.items()})


@pytest.mark.parametrize("width", WIDTHS)
@every_operator
def test_every_width_is_no_worse_than_eager_torch(name, width):
    assert_right(name, inputs_of(name, width=width))


@pytest.mark.parametrize(("batch", "num_patches"), [(1, 1), (1, 196), (7, 9), (3, 576)])
@every_operator
def test_any_number_of_pictures_and_patches_is_no_worse_than_eager_torch(name, batch, num_patches):
    assert_right(name, inputs_of(name, batch, num_patches=num_patches), num_patches)


def test_gather_under_autocast_gives_half_precision_from_an_fp32_stream():
    inputs = inputs_of("gather", source=torch.float32)

    def under_autocast(impl):
        def run(**given):
            with torch.autocast(DEVICE, HALF):
                return call("gather", impl)(**given)

        return run

    assert under_autocast("triton")(**inputs).dtype == HALF
    assert_parity(under_autocast("triton"), under_autocast("reference"), inputs)


@every_operator
def test_many_runs_give_the_same_bits(name):
    inputs = inputs_of(name, BATCH)
    expected = outputs_and_grads(call(name), inputs)
    for _ in range(RUNS):
        found = outputs_and_grads(call(name), inputs)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@every_operator
def test_each_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    assert_parity(torch.compile(call(name), fullgraph=True), call(name, "reference"), inputs_of(name))


@every_operator
def test_a_cuda_graph_of_forward_and_backward_replays_with_other_positions(name):
    first, second = inputs_of(name, seed=1), inputs_of(name, seed=2)
    leaves = {key: t.requires_grad_() if t.is_floating_point() else t for key, t in first.items()}
    wanted = [tensor for tensor in leaves.values() if tensor.requires_grad]

    def step():
        out = call(name)(**leaves)
        return out, *torch.autograd.grad(out.float().square().sum(), wanted)

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
        for key, leaf in leaves.items():
            leaf.copy_(second[key])
    graph.replay()
    torch.cuda.synchronize()
    replayed = [tensor.detach().clone() for tensor in captured]
    assert all(torch.equal(found, expected) for found, expected in zip(replayed, step(), strict=True))


@every_operator
def test_none_holds_much_more_than_it_returns(name):
    """Mean and rstd of gathered rows, and the partial sums of the parameters' gradients."""
    inputs = inputs_of(name, BATCH)
    outputs_and_grads(call(name), inputs_of(name, 1))  # compiles
    leaves = {key: t.requires_grad_() if t.is_floating_point() else t for key, t in inputs.items()}
    wanted = [tensor for tensor in leaves.values() if tensor.requires_grad]
    cotangent = torch.ones_like(call(name)(**leaves))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call(name)(**leaves)
    returned = (out, *torch.autograd.grad(out, wanted, cotangent))
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in returned)
    assert extra < 8 * MIB


@every_operator
def test_no_call_waits_for_the_gpu(name):
    inputs = inputs_of(name)
    outputs_and_grads(call(name), inputs)
    leaves = {key: t.requires_grad_() if t.is_floating_point() else t for key, t in inputs.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(name)(**leaves).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
