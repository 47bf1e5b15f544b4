"""The Triton residual_norm and residual_add, in Triton's interpreter, equal the reference."""

import os

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fused_beit.kernels import ImplUnavailable, residual_add, residual_norm
from fused_beit.kernels._triton.target import INTERPRETER
from fused_beit.kernels.testing import (
    assert_no_worse_than_eager,
    assert_parity,
    outputs_and_grads,
    residual_norm_inputs,
)

launch = pytest.importorskip("fused_beit.kernels.residual_norm.launch", exc_type=ImportError)
rows = pytest.importorskip("fused_beit.kernels._triton.rows", exc_type=ImportError)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: TRITON_INTERPRET=1"
)

# bf16 is not here: the interpreter computes it wrongly.
DTYPES = [torch.float32, torch.float16]
WITHOUT = [(), ("gamma",), ("keep",), ("gamma", "keep")]
OPERATORS = {"norm": residual_norm, "add": residual_add}
ADD_ARGUMENTS = ("x", "y", "gamma", "keep")
TWO_ROWS = 128  # numbers of a tile: two rows of 48 channels


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of few rows, so that few tokens make several programs of several tiles, and a last one that is not full."""
    monkeypatch.setattr(launch, "TILE", TWO_ROWS)


def inputs_of(operator, *shape, without=(), **options):
    names = ADD_ARGUMENTS if operator == "add" else None
    inputs = residual_norm_inputs(*shape, **options) | dict.fromkeys(without)
    return {name: inputs[name] for name in names or inputs}


def split_keep(inputs):
    """What has gradients, and `keep`, which has none."""
    return {name: tensor for name, tensor in inputs.items() if name != "keep"}, inputs["keep"]


def call(operator, keep, impl, **options):
    """The operator with this keep, in the dtype of x."""

    def run(x, **others):
        return OPERATORS[operator](x=x, keep=None if keep is None else keep.to(x.dtype), **others, **options, impl=impl)

    return run


def check(operator, inputs, **options):
    inputs, keep = split_keep(inputs)
    assert_parity(call(operator, keep, "triton", **options), call(operator, keep, "reference", **options), inputs)


def results(operator, inputs, impl="triton"):
    inputs, keep = split_keep(inputs)
    return outputs_and_grads(call(operator, keep, impl), inputs)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_close_in_float64(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("without", WITHOUT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_outputs_and_gradients_are_no_worse_than_eager_torch(small_tiles, operator, dtype, without):
    check(operator, inputs_of(operator, 3, 5, 48, dtype=dtype, without=without))


@pytest.mark.parametrize("operator", OPERATORS)
def test_float64_is_the_reference(small_tiles, operator):
    inputs = inputs_of(operator, 3, 5, 48, dtype=torch.float64)
    assert_close_in_float64(results(operator, inputs), results(operator, inputs, "reference"))


@pytest.mark.parametrize("width", [1, 7, 64, 65, 192, 384, 768, 1000, 1024, 1408])
def test_every_width_is_no_worse_than_eager_torch(width):
    check("norm", inputs_of("norm", 2, 3, width))


@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 1), (1, 7), (5, 1), (2, 17)])
def test_any_number_of_rows_is_no_worse_than_eager_torch(small_tiles, batch, num_tokens):
    check("norm", inputs_of("norm", batch, num_tokens, 48))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_tiles_of_this_machine_are_no_worse_than_eager_torch(operator):
    check(operator, inputs_of(operator, 2, 197, 64))


@pytest.mark.parametrize("operator", OPERATORS)
def test_more_partial_sums_than_are_added_at_once_are_all_added(monkeypatch, operator):
    monkeypatch.setitem(rows.PROGRAMS, INTERPRETER, 70)
    monkeypatch.setattr(launch, "TILE", 8)
    assert launch.SUM_CONFIG["ROWS"] < 70
    inputs = inputs_of(operator, 2, 35, 8, dtype=torch.float64)
    assert_close_in_float64(results(operator, inputs), results(operator, inputs, "reference"))


def test_rows_far_from_zero_are_centred_before_they_are_squared(small_tiles):
    inputs = inputs_of("norm", 2, 3, 48)
    inputs["x"] = inputs["x"] + 1000
    check("norm", inputs)


def test_eps_is_used(small_tiles):
    inputs = inputs_of("norm", 2, 3, 48)
    inputs["x"], inputs["y"] = 1e-3 * inputs["x"], 1e-3 * inputs["y"]
    check("norm", inputs, eps=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_dropped_picture_keeps_every_bit_and_its_branch_gets_no_gradient(operator, dtype):
    inputs = inputs_of(operator, 2, 3, 48, dtype=dtype)
    inputs["x"][1, 0, :4] = torch.tensor([0.0, -0.0, 6e-8, -6e-8])
    assert inputs["keep"].tolist() == [2.0, 0.0]
    found = results(operator, inputs)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found["output 0"][1].view(bits), inputs["x"][1].view(bits))
    assert not found["grad y"][1].any()
    assert found["grad y"][0].all()


@pytest.mark.parametrize("without", WITHOUT, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_narrower_branch_beside_an_fp32_stream_is_no_worse_than_eager_torch(small_tiles, operator, without):
    inputs = inputs_of(operator, 3, 5, 48, without=without)
    check(operator, inputs | {"y": inputs["y"].half()})


def test_a_half_precision_stream_beside_fp32_parameters_is_no_worse_than_eager_torch(small_tiles):
    inputs = inputs_of("norm", 3, 5, 48)
    check("norm", inputs | {name: inputs[name].half() for name in ("x", "y")})


def test_under_autocast_the_stream_stays_fp32_and_the_normed_is_in_its_dtype(small_tiles):
    inputs = inputs_of("norm", 3, 5, 48)
    inputs["y"] = inputs["y"].half()
    leaves, keep = split_keep(inputs)

    def under_autocast(impl):
        def run(**given):
            with torch.autocast("cpu", torch.float16):  # bf16 is what the interpreter cannot do
                return call("norm", keep, impl)(**given)

        return run

    found = outputs_and_grads(under_autocast("triton"), leaves)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "output 0": torch.float32,
        "output 1": torch.float16,
        "grad x": torch.float32,
        "grad y": torch.float16,
        "grad gamma": torch.float32,
        "grad weight": torch.float32,
        "grad bias": torch.float32,
    }
    assert_parity(under_autocast("triton"), under_autocast("reference"), leaves)
    with torch.autocast("cpu", torch.float16):
        added = residual_add(*(inputs[name] for name in ADD_ARGUMENTS), impl="triton")
    assert torch.equal(added, found["output 0"])


@pytest.mark.parametrize("without", WITHOUT, ids=str)
def test_gradients_pass_gradcheck(without):
    inputs, keep = split_keep(inputs_of("norm", 2, 3, 5, dtype=torch.float64, without=without))
    names = [name for name in inputs if inputs[name] is not None]
    leaves = [inputs[name].requires_grad_() for name in names]

    def norm(*given):
        return call("norm", keep, "triton")(**inputs | dict(zip(names, given, strict=True)))

    def add(*given):
        gamma = None if inputs["gamma"] is None else given[2]
        return residual_add(given[0], given[1], gamma, keep, impl="triton")

    assert torch.autograd.gradcheck(norm, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(add, leaves[:-2], fast_mode=True)


@pytest.mark.parametrize("used", [0, 1], ids=["x_new", "normed"])
def test_one_output_may_be_used_alone(small_tiles, used):
    inputs, keep = split_keep(inputs_of("norm", 3, 5, 48, dtype=torch.float64))
    found = outputs_and_grads(lambda **given: call("norm", keep, "triton")(**given)[used], inputs)
    expected = outputs_and_grads(lambda **given: call("norm", keep, "reference")(**given)[used], inputs)
    assert_close_in_float64(found, expected)


@pytest.mark.parametrize("wanted", ["x", "y", "gamma", "weight", "bias"])
def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch, wanted):
    asked = {}
    bwd = launch.residual_bwd

    def recorded(*arguments):
        asked.update(zip(("x", "y", "gamma", "weight", "bias"), arguments[9:], strict=True))
        asked["reads y"] = arguments[3]
        bwd(*arguments)

    monkeypatch.setattr(launch, "residual_bwd", recorded)
    inputs = inputs_of("norm", 2, 3, 48, dtype=torch.float64)
    cotangents = [torch.randn(2, 3, 48, dtype=torch.float64) for _ in range(2)]
    leaf = inputs[wanted].requires_grad_()
    grads = []
    for impl in ("triton", "reference"):
        outputs = residual_norm(**inputs, impl=impl)
        reached = [i for i in range(2) if outputs[i].requires_grad]  # weight and bias do not reach x_new
        grads += torch.autograd.grad([outputs[i] for i in reached], [leaf], [cotangents[i] for i in reached])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    assert [name for name, tensor in asked.items() if tensor is not None and name != "reads y"] == [wanted]
    assert (asked["reads y"] is not None) == (wanted == "gamma")


@pytest.mark.parametrize("operator", OPERATORS)
def test_two_runs_give_the_same_bits(small_tiles, operator):
    inputs = inputs_of(operator, 3, 5, 48)
    assert_equal(results(operator, inputs), results(operator, inputs))


@pytest.mark.parametrize("arch", [*rows.PROGRAMS, "sm_120"])
@pytest.mark.parametrize("width", [64, 768, 1408])
@pytest.mark.parametrize("num_rows", [1, 7, 25_216, 1_000_003])
def test_the_rows_of_a_program_follow_from_shape_and_architecture_alone(arch, width, num_rows):
    row = rows.cut(width, launch.TILE)
    each = rows.rows_a_program(num_rows, row, arch)
    num_programs = -(-num_rows // each)
    assert each % row.rows == 0
    assert num_programs <= rows.num_programs(arch)


@pytest.mark.parametrize(
    ("width", "pieces"),
    [(1, (1, 0)), (64, (64, 0)), (65, (64, 1)), (768, (512, 256)), (1024, (1024, 0)), (1408, (1024, 512))],
)
def test_a_row_is_cut_into_powers_of_two_that_hold_it(width, pieces):
    row = rows.cut(width, launch.TILE)
    assert (row.main, row.tail) == pieces


@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_of_any_strides_are_right(small_tiles, operator):
    inputs = inputs_of(operator, 3, 5, 48, dtype=torch.float64)
    strided = {name: tensor.repeat_interleave(2, dim=-1)[..., ::2] for name, tensor in inputs.items()}
    strided["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    grads = []
    for impl, given in (("triton", strided), ("reference", inputs)):
        leaves, keep = split_keep(given)
        for leaf in leaves.values():
            leaf.requires_grad_()
        outputs = call(operator, keep, impl)(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads.append(torch.autograd.grad(sum(output.square().sum() for output in outputs), list(leaves.values())))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gradient_of_the_output_may_have_any_strides(small_tiles, operator):
    inputs, keep = split_keep(inputs_of(operator, 3, 5, 48, dtype=torch.float64))
    wanted = [tensor.requires_grad_() for tensor in inputs.values()]
    grads = []
    for impl in ("triton", "reference"):
        outputs = call(operator, keep, impl)(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangent = torch.randn(48, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).t()
        cotangents = [cotangent.expand(3, 5, 48) for _ in outputs]
        grads.append(torch.autograd.grad(outputs, wanted, cotangents))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_picture_gives_gradients_of_zero(operator):
    inputs, _ = split_keep(inputs_of(operator, 1, 3, 8))
    inputs |= {name: inputs[name][:0] for name in ("x", "y")}
    found = outputs_and_grads(call(operator, torch.zeros(0), "triton"), inputs)
    assert found["output 0"].shape == (0, 3, 8)
    for name in ("gamma", "weight", "bias"):
        if name in inputs:
            assert torch.equal(found[f"grad {name}"], torch.zeros(8))


def test_no_row_past_the_last_is_read_or_written(small_tiles):
    """Every tensor of rows lies in a larger one, with NaN past the inputs, and past the outputs what must stay."""
    guards = []

    def rows(*shape, source=None):
        larger = torch.full((shape[0] + 1, *shape[1:]), 7.0 if source is None else torch.nan, dtype=torch.float64)
        if source is None:
            guards.append(larger[shape[0] :])
        else:
            larger[: shape[0]] = source
        return larger[: shape[0]]

    inputs = inputs_of("norm", 3, 5, 48, dtype=torch.float64)
    x, y = (rows(3, 5, 48, source=inputs[name]) for name in ("x", "y"))
    gamma, keep, weight, bias = (inputs[name] for name in ("gamma", "keep", "weight", "bias"))
    x_new, normed, grad_x, grad_y = (rows(3, 5, 48) for _ in range(4))
    mean, rstd = (rows(3, 5) for _ in range(2))
    sums = [torch.empty(48, dtype=torch.float64) for _ in range(3)]
    launch.residual_fwd(x, y, gamma, keep, weight, bias, 1e-6, x_new, normed, mean, rstd)
    launch.residual_bwd(x, y, x_new, y, gamma, keep, weight, mean, rstd, grad_x, grad_y, *sums)
    assert all(tensor.isfinite().all() for tensor in (x_new, normed, mean, rstd, grad_x, grad_y, *sums))
    assert all((guard == 7).all() for guard in guards)


def test_the_norm_is_that_of_the_stream_as_it_was_rounded(small_tiles):
    inputs = inputs_of("norm", 3, 5, 48, dtype=torch.float16)
    inputs["x"] = inputs["x"] + 1000  # where fp16 has steps of a half
    x_new, normed = residual_norm(**inputs, impl="triton")
    weight, bias = inputs["weight"], inputs["bias"]
    exact = F.layer_norm(x_new.double(), (48,), weight.double(), bias.double(), 1e-6)
    assert_no_worse_than_eager("normed", normed, F.layer_norm(x_new, (48,), weight, bias, 1e-6), exact)


def test_the_inputs_are_not_changed():
    inputs = inputs_of("norm", 2, 3, 48)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    results("norm", inputs)
    assert_equal(inputs, before)


@pytest.mark.parametrize("without", WITHOUT, ids=str)
def test_their_operators_pass_opcheck(without):
    inputs = inputs_of("norm", 2, 3, 8, without=without)
    leaves, keep = split_keep(inputs)
    x, y, gamma, weight, bias = (t if t is None else t.requires_grad_() for t in leaves.values())
    operators = torch.ops.fused_beit
    torch.library.opcheck(operators.residual_norm_fwd.default, (x, y, gamma, keep, weight, bias, 1e-6, torch.float32))
    torch.library.opcheck(operators.residual_add_fwd.default, (x, y, gamma, keep))


def test_the_operator_of_their_backward_passes_opcheck():
    x, y, gamma, keep, weight, bias = inputs_of("norm", 2, 3, 8).values()
    x_new, _, mean, rstd = torch.ops.fused_beit.residual_norm_fwd(x, y, gamma, keep, weight, bias, 1e-6, x.dtype)
    grads = [tensor.clone() for tensor in (x, y, gamma, weight, bias)]
    arguments = (x, y, x_new, y, gamma, keep, weight, mean, rstd, *grads)
    torch.library.opcheck(torch.ops.fused_beit.residual_bwd.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_both_compile_without_a_graph_break(operator, backend):
    torch.compiler.reset()
    inputs, keep = split_keep(inputs_of(operator, 2, 3, 8))
    plain = call(operator, keep, "triton")
    assert_parity(torch.compile(plain, fullgraph=True, backend=backend), plain, inputs)


@pytest.mark.parametrize("operator", OPERATORS)
def test_checkpointing_changes_no_bit(operator):
    inputs, keep = split_keep(inputs_of(operator, 2, 3, 48))
    plain = call(operator, keep, "triton")
    again = outputs_and_grads(lambda **given: checkpoint(plain, **given, use_reentrant=False), inputs)
    assert_equal(again, outputs_and_grads(plain, inputs))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("of", ["x", "y", "gamma"])
def test_a_gradient_of_a_gradient_is_refused(operator, of):
    inputs, keep = split_keep(inputs_of(operator, 2, 3, 8))
    for tensor in inputs.values():
        tensor.requires_grad_()
    outputs = call(operator, keep, "triton")(**inputs)
    loss = sum(output.square().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
    (grad,) = torch.autograd.grad(loss, [inputs[of]], create_graph=True)
    if (operator, of) == ("add", "x"):  # which is the gradient of the output, and differentiable
        grad = torch.autograd.grad(outputs.square().sum(), [inputs["y"]], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"impl='triton' has no second derivative.* use impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("of", ["x", "y", "gamma", "keep", "weight"])
def test_a_forward_mode_derivative_is_refused(of):
    inputs = inputs_of("norm", 2, 3, 8)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative; use impl='reference'"):
        torch.func.jvp(
            lambda tensor: residual_norm(**inputs | {of: tensor}, impl="triton"),
            (inputs[of],),
            (torch.ones_like(inputs[of]),),
        )


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gradient_of_keep_is_refused(operator):
    inputs = inputs_of(operator, 2, 3, 8)
    inputs["keep"].requires_grad_()
    with pytest.raises(ImplUnavailable, match="keep requires a gradient, and the kernels have none for it"):
        OPERATORS[operator](**inputs, impl="triton")
    with torch.no_grad():
        OPERATORS[operator](**inputs, impl="triton")


@pytest.mark.parametrize("name", ["x", "y", "weight"])
def test_bf16_is_refused_in_the_interpreter(name):
    inputs = inputs_of("norm", 2, 3, 8)
    inputs[name] = inputs[name].bfloat16()
    with pytest.raises(ImplUnavailable, match=r"residual_norm: impl='triton' was asked for, but.*bfloat16 wrongly"):
        residual_norm(**inputs, impl="triton")


def test_bf16_of_autocast_is_refused_in_the_interpreter():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ImplUnavailable, match="bfloat16 wrongly"):
        residual_norm(**inputs_of("norm", 2, 3, 8), impl="triton")
