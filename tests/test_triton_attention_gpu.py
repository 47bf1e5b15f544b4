"""The Triton attention compiled, at the sizes of BEiT, in bf16 and fp16: `make test-gpu`."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_beit.kernels import attention, attention_plan, rel_pos_attention
from fused_beit.kernels.rel_pos_attention import launch
from fused_beit.kernels.rel_pos_attention.plan import pinned
from fused_beit.kernels.testing import assert_no_worse_than_eager, outputs_and_grads, rel_pos_attention_inputs

pytestmark = pytest.mark.gpu

# Names, so that a dry run in the interpreter can set smaller ones.
DEVICE = "cuda"
HALF = torch.bfloat16
HALVES = [torch.bfloat16, torch.float16]
BATCH, NUM_HEADS, NUM_TOKENS, HEAD_DIM = 8, 12, 197, 64
RUNS = 100
MANY_PICTURES = 256  # whose grad_scores are more than the workspace holds
MIB = 2**20


def ours(qkv, bias, **options):
    return rel_pos_attention(qkv, bias, impl="triton", **options)


def reference(qkv, bias, **options):
    return rel_pos_attention(qkv, bias, impl="reference", **options)


def inputs_of(*, batch=None, num_tokens=None, head_dim=None, dtype=None, bias_dtype=torch.float32, seed=0):
    """qkv in half precision and a bias in fp32, as a model under autocast has them."""
    inputs = rel_pos_attention_inputs(
        batch or BATCH,
        num_tokens or NUM_TOKENS,
        NUM_HEADS,
        head_dim or HEAD_DIM,
        dtype=dtype or HALF,
        device=DEVICE,
        seed=seed,
    )
    # The numbers that half precision holds, so that no implementation rounds the bias.
    return inputs | {"bias": inputs["bias"].to(bias_dtype)}


def leaves_of(inputs):
    return inputs["qkv"].detach().clone().requires_grad_(), inputs["bias"].detach().clone().requires_grad_()


def cotangent_of(inputs, seed=0):
    batch, num_tokens, _, num_heads, head_dim = inputs["qkv"].shape
    shape = (batch, num_tokens, num_heads * head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, inputs["qkv"].dtype)


def exact_by_pictures(inputs, mask=None):
    """Output and gradients of the reference in float64, one picture after another: all of them would not fit."""
    qkv, bias, cotangent = inputs["qkv"].double(), inputs["bias"].double(), cotangent_of(inputs).double()
    outputs, grads_qkv, grad_bias = [], [], torch.zeros_like(bias)
    for b in range(len(qkv)):
        leaf, bias_leaf = qkv[b : b + 1].clone().requires_grad_(), bias.clone().requires_grad_()
        options = {} if mask is None else {"mask": mask[b % len(mask)].double()}
        out = reference(leaf, bias_leaf, **options)
        grad_qkv, grad = torch.autograd.grad(out, [leaf, bias_leaf], cotangent[b : b + 1])
        outputs.append(out.detach())
        grads_qkv.append(grad_qkv)
        grad_bias += grad
    return {"output 0": torch.cat(outputs), "grad qkv": torch.cat(grads_qkv), "grad bias": grad_bias}


def assert_right(function, inputs, mask=None):
    """The rule of fused_beit.kernels.testing, with eager torch in the dtype of the inputs."""
    options = {} if mask is None else {"mask": mask}
    found = outputs_and_grads(lambda qkv, bias: function(qkv, bias, **options), inputs)
    eager = outputs_and_grads(lambda qkv, bias: reference(qkv, bias, **options), inputs)
    exact = exact_by_pictures(inputs, mask)
    assert found.keys() == exact.keys()
    for name in exact:
        assert_no_worse_than_eager(name, found[name], eager[name], exact[name])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 50, 197, 224, 577, 1025])
def test_pictures_of_every_size_are_no_worse_than_eager_torch(num_tokens, dtype):
    if num_tokens == 1:  # its gradients of q, k and bias are zeros, of which eager torch has none wrong
        inputs = inputs_of(num_tokens=1, dtype=dtype)
        assert torch.equal(ours(**inputs), inputs["qkv"][:, :, 2].flatten(2))
        return
    assert_right(ours, inputs_of(num_tokens=num_tokens, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 32, 72, 96, 128])
def test_heads_of_every_size_are_no_worse_than_eager_torch(head_dim, dtype):
    assert_right(ours, inputs_of(head_dim=head_dim, dtype=dtype))


def test_fp32_is_no_worse_than_eager_torch():
    assert_right(ours, inputs_of(batch=2, dtype=torch.float32))


def test_a_bias_in_half_precision_is_no_worse_than_eager_torch():
    assert_right(ours, inputs_of(bias_dtype=HALF))


def test_the_pointer_family_is_as_right_as_that_of_tma():
    plan = attention_plan(launch.arch_of(torch.device(DEVICE)), HEAD_DIM, HALF, tma=False)
    assert not plan.tma
    with pinned(plan):
        assert_right(ours, inputs_of())


def test_atomics_are_no_worse_than_eager_torch():
    assert_right(lambda qkv, bias: ours(qkv, bias, deterministic=False), inputs_of())


def test_several_passes_give_the_bits_of_one(monkeypatch):
    inputs = inputs_of()
    expected = outputs_and_grads(ours, inputs)["grad bias"]
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 3 * launch.WORKSPACE_BYTES // 128)  # 3 MiB: 3 pictures of BEiT-base
    assert launch.num_pictures_a_pass(BATCH, NUM_HEADS, NUM_TOKENS, HALF) < BATCH
    assert torch.equal(outputs_and_grads(ours, inputs)["grad bias"], expected)


@pytest.mark.parametrize("num_rows", ["N", 1])
def test_with_masks_it_is_no_worse_than_eager_torch(num_rows):
    generator = torch.Generator().manual_seed(1)
    rows = NUM_TOKENS if num_rows == "N" else 1
    closed = torch.rand(2, rows, NUM_TOKENS, generator=generator) < 1 / 3
    closed[..., 0] = False
    mask = torch.zeros(closed.shape, dtype=HALF).masked_fill(closed, float("-inf")).to(DEVICE)
    assert_right(ours, inputs_of(), mask)


def test_a_mask_filled_with_the_smallest_number_is_right():
    """As transformers fill it, here for the first keys, so that a whole tile has nothing else."""
    mask = torch.zeros(1, 1, NUM_TOKENS, dtype=HALF, device=DEVICE)
    mask[..., : NUM_TOKENS // 2] = torch.finfo(HALF).min
    assert_right(ours, inputs_of(), mask)


def test_a_query_without_keys_gets_zeros_and_gives_no_gradient():
    mask = torch.ones(2, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool, device=DEVICE)
    mask[0, 3] = False
    mask[1] = False
    found = outputs_and_grads(lambda qkv, bias: ours(qkv, bias, mask=mask), inputs_of())
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert not found["output 0"][::2, 3].any()
    assert not found["output 0"][1::2].any()
    assert not found["grad qkv"][::2, 3, 0].any()
    assert not found["grad qkv"][1::2].any()
    assert not found["grad bias"][:, 3].any()


def test_a_view_that_no_descriptor_can_read_is_right():
    inputs = inputs_of()
    whole = inputs["qkv"]
    off_by_one = torch.cat([whole.new_zeros(1), whole.flatten()])[1:].view(whole.shape)
    assert off_by_one.data_ptr() % 16 == whole.element_size()
    leaf, bias = off_by_one.detach().requires_grad_(), inputs["bias"].clone().requires_grad_()
    out = ours(leaf, bias)
    grads = torch.autograd.grad(out, [leaf, bias], cotangent_of(inputs))
    eager, exact = outputs_and_grads(reference, inputs), exact_by_pictures(inputs)
    for name, tensor in zip(exact, (out.detach(), *grads), strict=True):
        assert_no_worse_than_eager(name, tensor, eager[name], exact[name])


def test_query_key_and_value_of_other_strides_are_right():
    def transposed(qkv, bias):
        q, k, v = (tensor.contiguous().transpose(1, 2) for tensor in qkv.unbind(2))
        return attention(q, k, v, bias, impl="triton").transpose(1, 2).flatten(2)

    assert_right(transposed, inputs_of())


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    assert_right(torch.compile(ours, fullgraph=True), inputs_of())


def test_compiles_with_a_gradient_of_many_layers():
    inputs = inputs_of()

    def two_layers(qkv, bias, gradient):
        first = ours(qkv, bias, accumulate_into=gradient)
        return ours(qkv * first.unflatten(2, (1, NUM_HEADS, HEAD_DIM)), bias, accumulate_into=gradient)

    torch.compiler.reset()
    gradients = []
    for function in (two_layers, torch.compile(two_layers, fullgraph=True, backend="aot_eager")):
        qkv, bias = leaves_of(inputs)
        gradients.append(torch.ones_like(bias))
        function(qkv, bias, gradients[-1]).backward(cotangent_of(inputs))
        assert bias.grad is None
    assert torch.equal(gradients[1], gradients[0])


def test_a_cuda_graph_of_forward_and_backward_replays_on_other_inputs():
    first, second = inputs_of(seed=1), inputs_of(seed=2)
    (qkv, bias), cotangent = leaves_of(first), cotangent_of(first, seed=1)

    def step():
        out = ours(qkv, bias)
        return (out, *torch.autograd.grad(out, [qkv, bias], cotangent))

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
        qkv.copy_(second["qkv"])
        bias.copy_(second["bias"])
        cotangent.copy_(cotangent_of(second, seed=2))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [tensor.detach().clone() for tensor in captured]
    assert all(torch.equal(found, expected) for found, expected in zip(replayed, step(), strict=True))


@pytest.mark.parametrize("num_tokens", [197, 577])
def test_many_runs_give_the_same_bits(num_tokens):
    inputs = inputs_of(num_tokens=num_tokens)
    expected = outputs_and_grads(ours, inputs)
    for _ in range(RUNS):
        found = outputs_and_grads(ours, inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def extra_bytes(batch, **options):
    """Most that a forward and backward hold beside what they are given and what they return."""
    inputs = inputs_of(batch=batch)
    (qkv, bias), cotangent = leaves_of(inputs), cotangent_of(inputs)
    del inputs
    small = outputs_and_grads(lambda qkv, bias: ours(qkv, bias, **options), inputs_of(batch=1))  # compiles
    del small
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = ours(qkv, bias, **options)
    returned = (out, *torch.autograd.grad(out, [qkv, bias], cotangent))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in returned)


def test_with_atomics_it_holds_next_to_nothing():
    assert extra_bytes(64, deterministic=False) < 25 * MIB


def test_in_order_it_holds_a_workspace_and_never_all_scores():
    all_scores = MANY_PICTURES * NUM_HEADS * NUM_TOKENS**2 * HALF.itemsize
    limit = launch.WORKSPACE_BYTES + 25 * MIB
    assert limit < all_scores
    assert extra_bytes(MANY_PICTURES) < limit


def test_under_autocast_it_equals_half_precision_and_grads_keep_the_parameters_dtype():
    inputs = inputs_of(dtype=torch.float32)
    qkv, bias = leaves_of(inputs)
    with torch.autocast(DEVICE, HALF):
        out = ours(qkv, bias)
    assert out.dtype == HALF
    assert torch.equal(out, ours(qkv.to(HALF), bias))
    grads = torch.autograd.grad(out, [qkv, bias], cotangent_of(inputs).to(HALF))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_checkpointing_changes_no_bit():
    inputs = inputs_of()
    plain = outputs_and_grads(ours, inputs)
    again = outputs_and_grads(lambda qkv, bias: checkpoint(ours, qkv, bias, use_reentrant=False), inputs)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_tensors_of_a_gpu_that_is_not_the_current_one_are_right():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = inputs_of()
    expected = outputs_and_grads(ours, inputs)
    with torch.cuda.device(0):
        found = outputs_and_grads(ours, {name: tensor.to("cuda:1") for name, tensor in inputs.items()})
    assert all(tensor.device == torch.device("cuda:1") for tensor in found.values())
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert all(torch.equal(found[name].to("cuda:0"), expected[name].to("cuda:0")) for name in expected)
