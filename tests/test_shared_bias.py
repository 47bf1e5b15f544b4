"""One bias for many layers: rounded once, its gradient summed in fp32 by autograd, however the layers are run."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from triton_families import NEEDS_INTERPRETER, exact_products  # noqa: F401

from fused_beit.kernels import RelativePositionBias, SharedBias, attention, rel_pos_attention
from fused_beit.kernels.testing import rel_pos_attention_inputs

TRITON = pytest.param("triton", marks=NEEDS_INTERPRETER)
IMPLS = ["reference", "sdpa", TRITON]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
WINDOW, NUM_TOKENS, NUM_HEADS, HEAD_DIM = (2, 3), 7, 2, 8


@pytest.fixture
def module():
    made = RelativePositionBias(WINDOW, NUM_HEADS)
    nn.init.normal_(made.relative_position_bias_table, generator=torch.Generator().manual_seed(0))
    return made


def qkv_of(dtype=torch.float32, seed=0):
    return rel_pos_attention_inputs(2, NUM_TOKENS, NUM_HEADS, HEAD_DIM, dtype=dtype, seed=seed)["qkv"]


def layer(qkv, bias, impl="reference"):
    """[B,N,3,H,D] -> the same, by way of attention."""
    return qkv * rel_pos_attention(qkv, bias, impl=impl).unflatten(2, (1, NUM_HEADS, HEAD_DIM))


def three_layers(qkv, bias, impl="reference", run=layer):
    for _ in range(3):
        qkv = run(qkv, bias, impl)
    return qkv.sum()


def gradient_of(module, loss, **options):
    module.zero_grad()
    loss.backward(**options)
    return module.relative_position_bias_table.grad.clone()


@pytest.mark.parametrize(
    ("table_dtype", "dtype", "expected"),
    [
        (torch.float32, None, (torch.float32, None)),
        (torch.float32, torch.bfloat16, (torch.float32, torch.bfloat16)),
        (torch.float32, torch.float64, (torch.float64, None)),
        (torch.float64, torch.float32, (torch.float64, torch.float32)),
        (torch.bfloat16, None, (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_the_bias_is_in_the_dtype_of_sums_and_rounded_to_that_of_the_products(module, table_dtype, dtype, expected):
    bias, rounded = module.to(table_dtype).shared(dtype)
    assert (bias.dtype, None if rounded is None else rounded.dtype) == expected


def test_both_have_the_values_of_the_forward_and_rows_that_need_no_copy(module):
    bias, rounded = module.shared(torch.bfloat16)
    assert torch.equal(bias, module())
    assert torch.equal(rounded, module(torch.bfloat16))
    assert bias.stride() == rounded.stride() == (NUM_TOKENS * 16, 16, 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_gives_the_bits_of_a_bias_that_each_layer_rounds(module, impl):
    bias, rounded = module.shared(torch.float16)
    qkv = qkv_of(torch.float16)
    assert torch.equal(layer(qkv, SharedBias(bias, rounded), impl), layer(qkv, bias, impl))


@NEEDS_INTERPRETER
def test_the_kernels_read_the_rounded_bias(module):
    bias, rounded = module.shared(torch.float16)
    qkv = qkv_of(torch.float16)
    assert torch.equal(layer(qkv, SharedBias(bias, 2 * rounded), "triton"), layer(qkv, 2 * bias, "triton"))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_the_table_is_that_of_a_plain_bias(module, impl):
    module.double()
    qkv = qkv_of(torch.float64)
    plain = gradient_of(module, three_layers(qkv, module(), impl))
    shared = gradient_of(module, three_layers(qkv, module.shared(), impl))
    torch.testing.assert_close(shared, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradients_of_half_precision_layers_are_summed_in_fp32(module, impl):
    shared = module.shared(torch.float16)
    bias, losses = shared.bias, [layer(qkv_of(torch.float16, seed), shared, impl).float().sum() for seed in range(3)]
    each = [torch.autograd.grad(loss, bias, retain_graph=True)[0] for loss in losses]
    (together,) = torch.autograd.grad(sum(losses), bias)
    assert together.dtype == torch.float32
    assert not torch.equal(together, together.half())
    # Autograd adds the last layer's first; two numbers of three may be added in either order.
    assert torch.equal(together, each[2] + each[1] + each[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_separate_query_key_and_value_take_it_too(module, impl):
    shared = module.shared(torch.float16)
    qkv = qkv_of(torch.float16).requires_grad_()
    packed = rel_pos_attention(qkv, shared, impl=impl)
    apart = attention(*qkv.permute(2, 0, 3, 1, 4), shared, impl=impl).transpose(1, 2).flatten(2)
    assert torch.equal(apart, packed)
    found, expected = (torch.autograd.grad(out.sum(), shared.bias, retain_graph=True)[0] for out in (apart, packed))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
@DTYPES
def test_layers_under_activation_checkpointing_reach_the_table(module, impl, dtype):
    def checkpointed(*arguments):
        return checkpoint(layer, *arguments, use_reentrant=False)

    expected = gradient_of(module, three_layers(qkv_of(dtype), module.shared(dtype), impl))
    found = gradient_of(module, three_layers(qkv_of(dtype), module.shared(dtype), impl, run=checkpointed))
    assert torch.equal(found, expected)


# torch's own, as it traces a function of a tensor that is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("impl", IMPLS)
@DTYPES
def test_layers_compiled_one_by_one_reach_the_table(module, impl, dtype):
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = gradient_of(module, three_layers(qkv_of(dtype), module.shared(dtype), impl))
    found = gradient_of(module, three_layers(qkv_of(dtype), module.shared(dtype), impl, run=compiled))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
@DTYPES
def test_sharing_and_its_layers_compile_in_one_graph(module, impl, dtype):
    expected = gradient_of(module, three_layers(qkv_of(dtype), module.shared(dtype), impl))
    torch.compiler.reset()
    compiled = torch.compile(
        lambda qkv: three_layers(qkv, module.shared(dtype), impl), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(gradient_of(module, compiled(qkv_of(dtype))), expected)


@pytest.mark.parametrize("impl", IMPLS)
@DTYPES
def test_another_gradient_over_the_same_graph_first_adds_nothing(module, impl, dtype):
    qkv = qkv_of(dtype).requires_grad_()
    loss = three_layers(qkv, module.shared(dtype), impl)
    torch.autograd.grad(loss, qkv, retain_graph=True)
    expected = gradient_of(module, three_layers(qkv_of(dtype), module.shared(dtype), impl))
    assert torch.equal(gradient_of(module, loss), expected)


@pytest.mark.parametrize("impl", IMPLS)
@DTYPES
def test_a_second_backward_over_one_graph_gives_the_same_gradient(module, impl, dtype):
    loss = three_layers(qkv_of(dtype), module.shared(dtype), impl)
    first = gradient_of(module, loss, retain_graph=True)
    assert torch.equal(gradient_of(module, loss), first)


def test_torch_func_sees_through_the_reference(module, impl="reference"):
    shared, qkv = module.shared(torch.float16), qkv_of(torch.float16)
    leaf = qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(leaf, shared, impl).sum(), leaf)
    assert torch.equal(torch.func.grad(lambda qkv: layer(qkv, shared, impl).sum())(qkv), expected)


def test_two_forwards_then_two_backwards_do_not_mix(module):
    expected = [gradient_of(module, three_layers(qkv_of(seed=seed), module.shared())) for seed in (0, 1)]
    losses = [three_layers(qkv_of(seed=seed), module.shared()) for seed in (0, 1)]
    assert torch.equal(gradient_of(module, losses[1]), expected[1])
    assert torch.equal(gradient_of(module, losses[0]), expected[0])


def test_without_gradients_the_bias_is_shared_all_the_same(module):
    with torch.no_grad():
        bias, rounded = module.shared(torch.bfloat16)
    assert not bias.requires_grad
    assert torch.equal(rounded, module(torch.bfloat16))


def test_a_frozen_table_costs_no_gradient(module):
    module.requires_grad_(False)
    qkv = qkv_of().requires_grad_()
    three_layers(qkv, module.shared()).backward()
    assert module.relative_position_bias_table.grad is None


class Sharing(nn.Module):
    """Three layers with one bias: a model whose table is used outside the module that holds it."""

    def __init__(self, shared):
        super().__init__()
        self.linear = nn.Linear(HEAD_DIM, HEAD_DIM)
        self.rel_pos_bias = RelativePositionBias(WINDOW, NUM_HEADS)
        self.shared = shared

    def forward(self, qkv):
        bias = self.rel_pos_bias.shared() if self.shared else self.rel_pos_bias()
        loss = (1 + three_layers(self.linear(qkv), bias)).square()
        return loss, loss.detach()


@pytest.mark.parametrize("stage", [0, 3])
def test_sharing_trains_a_table_under_zero(stage):
    from fused_beit.engine.config import Settings
    from fused_beit.engine.training import zero

    settings = Settings.model_validate({"zero": {"stage": stage}, "train": {"global_batch": 4, "threads": 1}})
    trained = []
    for shared in (False, True):
        torch.manual_seed(0)
        model = Sharing(shared)
        nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
        engine = zero.ZeroEngine(model, settings, zero.start(settings), bf16=False)
        for _ in range(2):
            engine.backward(engine(qkv_of())[0])
            engine.step()
        trained.append(engine.full_state_dict())
    for name in trained[0]:
        torch.testing.assert_close(trained[1][name], trained[0][name])
