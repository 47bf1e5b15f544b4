"""The Triton operators of masked pictures, in Triton's interpreter, equal the reference."""

import os
from functools import partial, update_wrapper

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_beit.kernels import ImplUnavailable, embed_tokens, gather_masked, keep_visible, restore_tokens
from fused_beit.kernels._triton.target import INTERPRETER
from fused_beit.kernels.testing import (
    assert_parity,
    embed_tokens_inputs,
    gather_masked_inputs,
    keep_visible_inputs,
    outputs_and_grads,
    restore_tokens_inputs,
)

launch = pytest.importorskip("fused_beit.kernels.masked_tokens.launch", exc_type=ImportError)
rows = pytest.importorskip("fused_beit.kernels._triton.rows", exc_type=ImportError)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: TRITON_INTERPRET=1"
)

# bf16 is not here: the interpreter computes it wrongly.
DTYPES = [torch.float32, torch.float16]
OPERATORS = {
    "embed": embed_tokens,
    "keep": keep_visible,
    "restore": restore_tokens,
    "gather": gather_masked,
    "rows": update_wrapper(partial(gather_masked, weight=None, bias=None), gather_masked),
}
POSITIONS = {
    "embed": "masked_positions",
    "keep": "visible_positions",
    "restore": "visible_positions",
    "gather": "masked_positions",
    "rows": "masked_positions",
}
SOURCE = {"embed": "patches", "keep": "patches", "restore": "x", "gather": "x", "rows": "x"}
PARAMETERS = {
    "embed": ("mask_token", "cls_token", "pos_embed"),
    "keep": ("cls_token", "pos_embed"),
    "restore": ("mask_token", "pos_embed"),
    "gather": ("weight", "bias"),
    "rows": (),
}

every_operator = pytest.mark.parametrize("operator", OPERATORS)


def inputs_of(operator, batch=3, num_patches=9, width=48, num_listed=4, *, without=(), **options):
    """P patches of which `num_listed` are listed; for gather and rows, P+1 tokens."""
    shape = (batch, num_patches, width, num_listed)
    if operator in ("gather", "rows"):
        made = gather_masked_inputs(batch, num_patches + 1, width, num_listed, **options)
        return {name: made[name] for name in ("x", "masked_positions", *PARAMETERS[operator])}
    makers = {"embed": embed_tokens_inputs, "keep": keep_visible_inputs, "restore": restore_tokens_inputs}
    return makers[operator](*shape, **options) | dict.fromkeys(without)


def call(operator, impl="triton", num_patches=9, **options):
    if operator == "restore":
        options["num_patches"] = num_patches
    return lambda **inputs: OPERATORS[operator](**inputs, **options, impl=impl)


def check(operator, inputs, **options):
    assert_parity(call(operator, "triton", **options), call(operator, "reference", **options), inputs)


def results(operator, inputs, impl="triton", **options):
    return outputs_and_grads(call(operator, impl, **options), inputs)


def assert_float64_is_the_reference(operator, inputs, **options):
    found, expected = (results(operator, inputs, impl, **options) for impl in ("triton", "reference"))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of two rows and four slots, so that few tokens make several programs, and last ones that are not full."""
    monkeypatch.setattr(launch, "TILE", 128)
    monkeypatch.setattr(launch, "COMPARED", 8)


@pytest.mark.parametrize("num_padding", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_operator
def test_outputs_and_gradients_are_no_worse_than_eager_torch(small_tiles, operator, dtype, num_padding):
    check(operator, inputs_of(operator, dtype=dtype, num_padding=num_padding))


@pytest.mark.parametrize("num_padding", [0, 2])
@every_operator
def test_float64_is_the_reference(small_tiles, operator, num_padding):
    assert_float64_is_the_reference(operator, inputs_of(operator, dtype=torch.float64, num_padding=num_padding))


@pytest.mark.parametrize("num_listed", [0, 1, 9])
@every_operator
def test_none_one_and_all_of_the_patches_may_be_listed(small_tiles, operator, num_listed):
    assert_float64_is_the_reference(operator, inputs_of(operator, num_listed=num_listed, dtype=torch.float64))


@pytest.mark.parametrize("without", [("pos_embed",), ("masked_positions",), ("pos_embed", "masked_positions")], ids=str)
def test_embed_works_without_positions_and_without_masks(small_tiles, without):
    check("embed", inputs_of("embed", without=without))


@pytest.mark.parametrize("operator", ["keep", "restore"])
def test_keep_and_restore_work_without_positions(small_tiles, operator):
    check(operator, inputs_of(operator, without=("pos_embed",)))


@pytest.mark.parametrize("width", [1, 7, 65, 768, 1408])
@every_operator
def test_every_width_is_no_worse_than_eager_torch(operator, width):
    check(operator, inputs_of(operator, 2, 3, width, 2), num_patches=3)


@pytest.mark.parametrize(("batch", "num_patches", "num_listed"), [(1, 1, 1), (1, 16, 6), (5, 2, 1), (2, 25, 11)])
@every_operator
def test_any_number_of_pictures_and_patches_is_right(small_tiles, operator, batch, num_patches, num_listed):
    inputs = inputs_of(operator, batch, num_patches, 48, num_listed, dtype=torch.float64)
    assert_float64_is_the_reference(operator, inputs, num_patches=num_patches)


@pytest.mark.parametrize(("width", "num_slots", "rows"), [(64, 75, 8), (64, 410, 2), (64, 3073, 1), (768, 75, 2)])
def test_a_tile_has_fewer_rows_where_many_slots_are_looked_through(width, num_slots, rows):
    assert launch._cut(width, num_slots).rows == rows


@every_operator
def test_many_slots_and_narrow_rows_are_right(operator):
    inputs = inputs_of(operator, 1, 180, 4, 150, dtype=torch.float64)
    assert_float64_is_the_reference(operator, inputs, num_patches=180)


@every_operator
def test_the_tiles_of_this_machine_are_no_worse_than_eager_torch(operator):
    check(operator, inputs_of(operator, 1, 196, 64, 75), num_patches=196)


@every_operator
def test_more_partial_sums_than_are_added_at_once_are_all_added(monkeypatch, operator):
    monkeypatch.setitem(rows.PROGRAMS, INTERPRETER, 50)
    monkeypatch.setattr(launch, "TILE", 8)
    monkeypatch.setattr(launch, "SUM_ROWS", 4)
    inputs = inputs_of(operator, 5, 9, 8, 4, dtype=torch.float64)
    assert_float64_is_the_reference(operator, inputs)


@every_operator
def test_only_the_gradients_that_are_asked_for_are_computed(small_tiles, monkeypatch, operator):
    asked = []
    name, names, first = ("gather_bwd", ("x", "weight", "bias"), 7)
    if operator not in ("gather", "rows"):
        # That of CLS is the first row of that of the positions.
        name, names, first = ("place_bwd", (SOURCE[operator], "mask_token", "tokens"), 4)
    bwd = getattr(launch, name)

    def recorded(*arguments):
        asked[:] = [name for name, tensor in zip(names, arguments[first:], strict=True) if tensor is not None]
        bwd(*arguments)

    monkeypatch.setattr(launch, name, recorded)
    for wanted in (SOURCE[operator], *PARAMETERS[operator]):
        inputs = inputs_of(operator, dtype=torch.float64)
        leaf = inputs[wanted].requires_grad_()
        grads = [
            torch.autograd.grad(call(operator, impl)(**inputs).square().sum(), leaf) for impl in ("triton", "reference")
        ]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
        assert asked == ["tokens" if wanted in ("cls_token", "pos_embed") else wanted]


@pytest.mark.parametrize("operator", ["gather", "rows"])
def test_gather_counts_positions_from_after_the_prefix(small_tiles, operator):
    inputs = inputs_of(operator, dtype=torch.float64)
    inputs["x"] = torch.cat([inputs["x"], inputs["x"].flip(1)], dim=1)
    for num_prefix_tokens in (0, 1, 5):
        assert_float64_is_the_reference(operator, inputs, num_prefix_tokens=num_prefix_tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_their_gradient_are_copies_bit_by_bit(small_tiles, dtype):
    inputs = inputs_of("rows", num_padding=2, dtype=dtype)
    assert_equal(results("rows", inputs), results("rows", inputs, "reference"))


def test_gather_uses_eps_and_centres_before_it_squares(small_tiles):
    inputs = inputs_of("gather")
    check("gather", inputs | {"x": 1e-3 * inputs["x"]}, eps=1e-4)
    check("gather", inputs | {"x": 1000 + inputs["x"]})


@pytest.mark.parametrize("operator", ["embed", "keep"])
def test_a_patch_that_is_not_used_gets_a_gradient_of_zero_whatever_comes_in(operator):
    inputs = inputs_of(operator, 2, 9, 48, 4)
    patches = inputs["patches"].requires_grad_()
    out = call(operator)(**inputs)
    used = torch.zeros(2, 9, dtype=torch.bool).scatter(1, inputs[POSITIONS[operator]], True)
    cotangent = torch.ones_like(out)
    if operator == "embed":
        used = ~used
        cotangent[:, 1:][~used] = torch.inf
    else:
        patches.data[~used] = torch.nan
        assert call(operator)(**inputs).isfinite().all()
    (grad,) = torch.autograd.grad(out, patches, cotangent)
    assert torch.equal(grad, used[:, :, None].expand(2, 9, 48).float())


@pytest.mark.parametrize("operator", ["gather", "rows"])
def test_what_is_in_an_unused_row_does_no_harm(operator):
    inputs = inputs_of(operator, 2, 9, 48, 4)
    rows = torch.ones(2, 10, dtype=torch.bool).scatter(1, inputs["masked_positions"] + 1, False)
    clean = results(operator, inputs)
    inputs["x"][rows] = torch.nan
    assert_equal(results(operator, inputs), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@every_operator
def test_a_narrower_input_beside_fp32_parameters_is_no_worse_than_eager_torch(small_tiles, operator, dtype):
    inputs = inputs_of(operator)
    inputs[SOURCE[operator]] = inputs[SOURCE[operator]].half()
    inputs |= {name: inputs[name].to(dtype) for name in PARAMETERS[operator][:1]}
    check(operator, inputs)
    assert call(operator)(**inputs).dtype == call(operator, "reference")(**inputs).dtype


def test_gather_under_autocast_is_in_its_dtype(small_tiles):
    inputs = inputs_of("gather")

    def under_autocast(impl):
        def run(**given):
            with torch.autocast("cpu", torch.float16):  # bf16 is what the interpreter cannot do
                return call("gather", impl)(**given)

        return run

    assert under_autocast("triton")(**inputs).dtype == torch.float16
    assert_parity(under_autocast("triton"), under_autocast("reference"), inputs)


def test_rows_stay_in_their_dtype_under_autocast():
    inputs = inputs_of("rows")
    with torch.autocast("cpu", torch.float16):
        assert call("rows")(**inputs).dtype == torch.float32


@every_operator
def test_gradients_pass_gradcheck(operator):
    inputs = inputs_of(operator, 2, 4, 3, 2, num_padding=1, dtype=torch.float64)
    names = [SOURCE[operator], *PARAMETERS[operator]]
    leaves = [inputs[name].requires_grad_() for name in names]
    run = call(operator, num_patches=4)
    assert torch.autograd.gradcheck(
        lambda *given: run(**inputs | dict(zip(names, given, strict=True))), leaves, fast_mode=True
    )


@every_operator
def test_tensors_of_any_strides_are_right(small_tiles, operator):
    inputs = inputs_of(operator, dtype=torch.float64)
    strided = {name: tensor.repeat_interleave(2, dim=-1)[..., ::2] for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    leaves = [SOURCE[operator], *PARAMETERS[operator]]
    grads = []
    for impl, given in (("triton", strided), ("reference", inputs)):
        out = call(operator, impl)(**given | {name: given[name].requires_grad_() for name in leaves})
        cotangent = torch.randn(48, generator=torch.Generator().manual_seed(1), dtype=torch.float64).expand(out.shape)
        grads.append([out, *torch.autograd.grad(out, [given[name] for name in leaves], cotangent)])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@every_operator
def test_no_picture_gives_gradients_of_zero(operator):
    inputs = inputs_of(operator, 1)
    inputs |= {name: inputs[name][:0] for name in (SOURCE[operator], POSITIONS[operator])}
    found = results(operator, inputs)
    for name in PARAMETERS[operator]:
        assert torch.equal(found[f"grad {name}"], torch.zeros_like(inputs[name]))


def test_the_gradients_of_cls_and_positions_are_tensors_of_their_own():
    """An optimiser that changes one in place, as clipping does, must not change the other."""
    inputs = inputs_of("embed")
    cls_token, pos_embed = (inputs[name].requires_grad_() for name in ("cls_token", "pos_embed"))
    call("embed")(**inputs).sum().backward()
    cls_token.grad.zero_()
    assert pos_embed.grad[0].all()


@pytest.mark.parametrize("place", ["embed", "keep", "restore"])
def test_what_lies_past_the_last_row_changes_nothing_and_is_not_changed(small_tiles, place):
    inputs, outputs = Guarded(nan=True), Guarded(nan=False)
    positions = inputs_of("embed")["masked_positions"]
    cls_token = None if place == "restore" else inputs.empty(48)
    mask_token = None if place == "keep" else inputs.empty(48)
    pos_embed = inputs.empty(10, 48)
    source_shape = (3, 5, 48) if place == "restore" else (3, 9, 48)
    source = inputs.empty(*source_shape)
    grad = inputs.empty(3, 5 if place == "keep" else 10, 48)
    out, grad_source = outputs.empty(*grad.shape), outputs.empty(*source_shape)
    grad_mask = None if place == "keep" else outputs.empty(48)
    grad_tokens = outputs.empty(10, 48)
    launch.place_fwd(place, source, cls_token, mask_token, pos_embed, positions, 9, out)
    launch.place_bwd(place, grad, positions, 9, grad_source, grad_mask, grad_tokens)
    outputs.check()


def test_what_lies_past_the_last_row_changes_nothing_and_is_not_changed_by_rows(small_tiles):
    inputs, outputs = Guarded(nan=True), Guarded(nan=False)
    positions = inputs_of("rows")["masked_positions"]
    x, grad = inputs.empty(3, 10, 48), inputs.empty(12, 48)
    out, grad_x = outputs.empty(12, 48), outputs.empty(3, 10, 48)
    launch.gather_fwd(x, positions, None, None, 1e-6, 1, out, None, None)
    launch.gather_bwd(grad, None, positions, None, None, None, 1, grad_x, None, None)
    outputs.check()


def test_what_lies_past_the_last_row_changes_nothing_and_is_not_changed_by_gather(small_tiles):
    inputs, outputs = Guarded(nan=True), Guarded(nan=False)
    positions = inputs_of("gather")["masked_positions"]
    x, weight, bias, grad = inputs.empty(3, 10, 48), inputs.empty(48), inputs.empty(48), inputs.empty(12, 48)
    out, mean, rstd = outputs.empty(12, 48), outputs.empty(12), outputs.empty(12)
    grad_x, grad_weight, grad_bias = outputs.empty(3, 10, 48), outputs.empty(48), outputs.empty(48)
    launch.gather_fwd(x, positions, weight, bias, 1e-6, 1, out, mean, rstd)
    launch.gather_bwd(grad, x, positions, weight, mean, rstd, 1, grad_x, grad_weight, grad_bias)
    outputs.check()


class Guarded:
    """Tensors that are the heads of larger ones: inputs with NaN past their end, outputs with what must stay."""

    def __init__(self, *, nan):
        self.past = torch.nan if nan else 7.0
        self.tensors = []

    def empty(self, *shape):
        larger = torch.full((shape[0] + 1, *shape[1:]), self.past, dtype=torch.float64)
        larger[:-1] = torch.rand(shape, dtype=torch.float64)
        self.tensors.append(larger)
        return larger[:-1]

    def check(self):
        assert all(larger[:-1].isfinite().all() for larger in self.tensors)
        assert all((larger[-1] == self.past).all() for larger in self.tensors)


@every_operator
def test_the_operators_pass_opcheck(operator):
    inputs = inputs_of(operator, 2, 4, 8, 2, num_padding=1)
    source, positions = inputs[SOURCE[operator]].requires_grad_(), inputs[POSITIONS[operator]]
    parameters = {name: inputs[name].requires_grad_() for name in PARAMETERS[operator]}
    if operator in ("gather", "rows"):
        given = [parameters.get(name) for name in ("weight", "bias")]
        arguments = (source, positions, *given, 1e-6, 1, torch.float32)
        torch.library.opcheck(torch.ops.fused_beit.gather_masked_fwd.default, arguments)
    else:
        given = [parameters.get(name) for name in ("cls_token", "mask_token", "pos_embed")]
        torch.library.opcheck(torch.ops.fused_beit.place_tokens_fwd.default, (operator, source, *given, positions, 4))


def test_the_operators_of_their_backward_pass_opcheck():
    patches, mask_token, _, pos_embed, positions = inputs_of("embed", 2, 4, 8, 2).values()
    grad = torch.randn(2, 5, 8)
    arguments = ("embed", grad, positions, 4, patches.clone(), mask_token.clone(), pos_embed.clone())
    torch.library.opcheck(torch.ops.fused_beit.place_tokens_bwd.default, arguments)
    x, positions, weight, bias = inputs_of("gather", 2, 4, 8, 2).values()
    out, mean, rstd = torch.ops.fused_beit.gather_masked_fwd(x, positions, weight, bias, 1e-6, 1, x.dtype)
    grads = [tensor.clone() for tensor in (x, weight, bias)]
    for arguments in (
        (out, x, positions, weight, mean, rstd, 1, *grads),
        (out, None, positions, None, None, None, 1, grads[0], None, None),
    ):
        torch.library.opcheck(torch.ops.fused_beit.gather_masked_bwd.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@every_operator
def test_each_compiles_without_a_graph_break(operator, backend):
    torch.compiler.reset()
    plain = call(operator)
    assert_parity(torch.compile(plain, fullgraph=True, backend=backend), plain, inputs_of(operator, num_padding=1))


@every_operator
def test_checkpointing_changes_no_bit(operator):
    inputs = inputs_of(operator)
    again = outputs_and_grads(lambda **given: checkpoint(call(operator), **given, use_reentrant=False), inputs)
    assert_equal(again, results(operator, inputs))


@every_operator
def test_a_gradient_of_a_gradient_is_refused(operator):
    inputs = inputs_of(operator)
    source = inputs[SOURCE[operator]].requires_grad_()
    (grad,) = torch.autograd.grad(call(operator)(**inputs).square().sum(), source, create_graph=True)
    with pytest.raises(RuntimeError, match=r"impl='triton' has no second derivative.* use impl='reference'"):
        grad.sum().backward()


@every_operator
def test_a_forward_mode_derivative_is_refused(operator):
    inputs = inputs_of(operator)
    name = SOURCE[operator]
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative; use impl='reference'"):
        torch.func.jvp(lambda x: call(operator)(**inputs | {name: x}), (inputs[name],), (inputs[name],))


@every_operator
def test_bf16_is_refused_in_the_interpreter(operator):
    inputs = inputs_of(operator)
    inputs[SOURCE[operator]] = inputs[SOURCE[operator]].bfloat16()
    with pytest.raises(ImplUnavailable, match=rf"{OPERATORS[operator].__name__}: impl='triton'.*bfloat16 wrongly"):
        call(operator)(**inputs)
