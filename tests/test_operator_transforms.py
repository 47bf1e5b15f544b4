"""Every operator under what runs, records or exports it without values: torch.fx, meta tensors, torch.func, export."""

import subprocess
import sys

import pytest
import torch
from public_operators import CALLS, WINDOW, call, numbers
from torch import fx, nn
from triton_families import NEEDS_INTERPRETER

from fused_beit.kernels import (
    RelativePositionBias,
    SharedBias,
    interpolate_table,
    masked_positions_from_bool,
    operators,
    rel_pos_attention,
    residual_norm,
    token_loss,
)

TRITON = pytest.param("triton", marks=NEEDS_INTERPRETER)
ATTENTION = ("attention", "rel_pos_attention")
every_operator = pytest.mark.parametrize("name", CALLS)


def test_there_is_a_call_of_every_operator():
    assert tuple(sorted(CALLS)) == operators()


class Calling(nn.Module):
    """Somebody's module that calls one operator with what it is given, and the other arguments as they are."""

    def __init__(self, function, given, **others):
        super().__init__()
        self.function, self.given, self.others = function, list(given), others

    def forward(self, *tensors):
        return self.function(**dict(zip(self.given, tensors, strict=True)), **self.others)


def calls_of(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


class ByPosition(fx.Tracer):
    """Takes the arguments of `forward` for as many placeholders as there are names."""

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        super().create_args_for_root(lambda root: None, is_module, concrete_args)
        root = self.root
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in root.given]
        return (lambda _: root.forward(*proxies)), [root]


def traced(module):
    return fx.GraphModule(module, ByPosition().trace(module))


@every_operator
def test_symbolic_tracing_records_one_call(name):
    function, arguments = CALLS[name]
    tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in arguments.items() if key not in tensors}
    module = traced(Calling(function, tensors, **others))
    assert calls_of(module.graph) == [function]
    found = module(*tensors.values())
    for one, expected in zip(found if isinstance(found, tuple) else (found,), call(name, "auto"), strict=True):
        assert torch.equal(one, expected)


class Model(nn.Module):
    """A block of somebody's, with a bias of its own, options, and results that are unpacked or have names."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.position_bias = RelativePositionBias(WINDOW, 2)
        nn.init.normal_(self.position_bias.relative_position_bias_table)
        self.qkv, self.norm, self.head = nn.Linear(16, 48), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x, targets):
        bias = self.position_bias.shared(x.dtype) if self.shared else self.position_bias()
        qkv = self.qkv(x).unflatten(-1, (3, 2, 8))
        y = rel_pos_attention(qkv, bias, scale=0.5, impl="reference")
        x, normed = residual_norm(x, y, None, None, self.norm.weight, self.norm.bias)[:2]
        loss = token_loss(normed.flatten(0, 1), self.head.weight, self.head.bias, targets)
        return x, loss.loss


@pytest.mark.parametrize("shared", [True, False])
def test_a_model_that_uses_them_traces_and_runs_and_learns_as_before(shared):
    model, x, targets = Model(shared), numbers(2, 3, 16), torch.tensor([0, 1, 2, 3, 4, -100])
    graph = fx.symbolic_trace(model)
    for found, expected in zip(graph(x, targets), model(x, targets), strict=True):
        assert torch.equal(found, expected)
    graph(x, targets)[1].backward()
    assert graph.position_bias.relative_position_bias_table.grad.any()


def test_a_shared_bias_put_together_by_hand_is_recorded_too():
    class Layer(nn.Module):
        def forward(self, qkv, bias, rounded):
            return rel_pos_attention(qkv, SharedBias(bias, rounded))

    qkv, bias = numbers(1, 3, 3, 2, 8).half(), numbers(2, 3, 3)
    graph = fx.symbolic_trace(Layer())
    assert calls_of(graph.graph) == [SharedBias, rel_pos_attention]
    assert torch.equal(graph(qkv, bias, bias.half()), rel_pos_attention(qkv, bias))


def test_the_functions_that_have_no_implementations_are_recorded_too():
    class Layer(nn.Module):
        def forward(self, table, mask):
            return interpolate_table(table, WINDOW, (2, 2)), masked_positions_from_bool(mask, num_slots=2)

    graph = fx.symbolic_trace(Layer())
    assert calls_of(graph.graph) == [interpolate_table, masked_positions_from_bool]
    table, mask = graph(numbers(6, 2), torch.tensor([[True, False, True]]))
    assert torch.equal(table, interpolate_table(numbers(6, 2), WINDOW, (2, 2)))
    assert mask.tolist() == [[0, 2]]


def test_what_is_wrong_is_said_where_the_graph_runs():
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, qkv):
            return rel_pos_attention(qkv, None, scale=self.scale)

    graph = fx.symbolic_trace(Temperature())
    with pytest.raises(TypeError, match="multiply what is learned into q"):
        graph(numbers(1, 3, 3, 2, 8))


@pytest.mark.parametrize("impl", ["auto", "reference", "sdpa", TRITON])
@every_operator
def test_runs_on_the_meta_device(name, impl):
    if impl == "sdpa" and name not in ATTENTION:
        pytest.skip("has no sdpa")
    arguments = CALLS[name][1]
    tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    expected = call(name, "reference")
    found = call(name, impl, **{key: tensor.to("meta") for key, tensor in tensors.items()})
    for one, other in zip(found, expected, strict=True):
        assert (one.device.type, one.shape, one.dtype) == ("meta", other.shape, other.dtype)


@pytest.mark.parametrize("impl", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("name", ATTENTION)
def test_a_mask_and_a_gradient_run_on_the_meta_device_too(name, impl):
    tensors = {key: tensor.to("meta").requires_grad_() for key, tensor in CALLS[name][1].items()}
    out = call(name, impl, **tensors, mask=torch.ones(2, 1, 5, dtype=torch.bool, device="meta"))[0]
    out.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in tensors.values())


def test_a_module_made_on_the_meta_device_runs():
    with torch.device("meta"):
        module = RelativePositionBias(WINDOW, 2)
        assert module().shape == module.shared(torch.bfloat16).rounded.shape == (2, 3, 3)
        assert interpolate_table(torch.zeros(6, 2), WINDOW, (2, 2)).shape == (12, 2)


# What torch.func says of an operator without a rule of its own for a batch of calls.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@NEEDS_INTERPRETER
@every_operator
def test_a_gradient_of_torch_func_through_triton_is_refused_with_what_serves(name):
    first = next(iter(CALLS[name][1].values()))
    argument = next(iter(CALLS[name][1]))

    def total(tensor, impl="triton"):
        return sum(out.float().sum() for out in call(name, impl, **{argument: tensor}))

    if name == "nearest_code":  # which has no gradient
        assert not torch.func.grad(total)(first).any()
        return
    why = f"{name}: impl='triton' has no gradient in torch.func transforms; use impl='reference'"
    for transformed in (torch.func.grad(total), lambda t: torch.func.vmap(torch.func.grad(total))(t[None])):
        with pytest.raises(RuntimeError, match=why):
            transformed(first)
    assert torch.func.grad(lambda tensor: total(tensor, "reference"))(first).isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("impl", ["reference", "sdpa", TRITON])
@pytest.mark.parametrize("name", ATTENTION)
def test_vmap_runs_every_implementation(name, impl):
    tensors = CALLS[name][1]
    batched = {key: torch.stack([tensor, 2 * tensor]) for key, tensor in tensors.items()}
    found = torch.func.vmap(lambda given: call(name, impl, **given)[0])(batched)
    for i in range(2):
        expected = call(name, impl, **{key: tensor[i] for key, tensor in batched.items()})[0]
        torch.testing.assert_close(found[i], expected)


@NEEDS_INTERPRETER
def test_an_unrelated_transform_around_it_is_none_of_its_business():
    qkv = CALLS["rel_pos_attention"][1]["qkv"]

    def outside(x):
        return x.square().sum() + rel_pos_attention(qkv, None, impl="triton").sum()

    assert torch.equal(torch.func.grad(outside)(torch.ones(3)), torch.full((3,), 2.0))


def named_ops(program):
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own, of its export
@pytest.mark.parametrize("shared", [True, False])
def test_an_exported_program_that_was_decomposed_has_none_of_our_operators(shared):
    model, inputs = Model(shared).eval(), (torch.ones(2, 3, 16), torch.tensor([0, 1, 2, 3, 4, -100]))
    program = torch.export.export(model, inputs)
    assert "fused_beit" in named_ops(program)
    decomposed = program.run_decompositions()
    assert named_ops(decomposed) <= {"aten", "prims"}
    torch.testing.assert_close(decomposed.module()(*inputs)[1], model(*inputs)[1])


LOAD = """
import sys, torch
program = torch.export.load(sys.argv[1])
assert "fused_beit.kernels" not in sys.modules
print(program.module()(torch.ones(2, 3, 16), torch.tensor([0, 1, 2, 3, 4, -100]))[1].item())
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own, of its export
def test_a_decomposed_program_loads_where_the_library_is_not_imported(tmp_path):
    model, inputs = Model(shared=True).eval(), (torch.ones(2, 3, 16), torch.tensor([0, 1, 2, 3, 4, -100]))
    program = torch.export.export(model, inputs)
    done = {}
    for name, saved in {"ours": program, "torch's": program.run_decompositions()}.items():
        torch.export.save(saved, tmp_path / "model.pt2")
        command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt2")]
        done[name] = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "deserializing" in done["ours"].stderr
    assert done["torch's"].returncode == 0, done["torch's"].stderr
    assert float(done["torch's"].stdout) == pytest.approx(model(*inputs)[1].item(), rel=1e-6)


def test_a_traced_torchscript_runs():
    model, x, targets = Model(shared=True).eval(), numbers(2, 3, 16), torch.tensor([0, 1, 2, 3, 4, -100])
    with pytest.warns(Warning):  # torch's own: of TorchScript, and of what it traces
        script = torch.jit.trace(model, (x, targets))
    torch.testing.assert_close(script(x, targets)[1], model(x, targets)[1])
