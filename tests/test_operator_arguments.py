"""What every operator says to arguments that others would take: tensors for numbers, spare axes, odd dtypes."""

import pytest
import torch
from public_operators import CALLS, call
from triton_families import NEEDS_INTERPRETER

from fused_beit.kernels import (
    RelativePositionBias,
    attention,
    embed_tokens,
    interpolate_table,
    keep_visible,
    masked_positions_from_bool,
    rel_pos_attention,
    token_loss,
)
from fused_beit.kernels.rel_pos_attention.bias import num_relative_positions

TRITON = pytest.param("triton", marks=NEEDS_INTERPRETER)
EVERY_IMPL = ["auto", "reference", "sdpa", "flex", TRITON]

NUMBERS = [
    ("rel_pos_attention", "scale", 0.5),
    ("attention", "scale", 0.5),
    ("rel_pos_attention", "deterministic", True),
    ("embed_tokens", None, None),
    ("expand_table", "cls_token", True),
    ("scatter_table", "cls_token", True),
    ("gather_masked", "eps", 1e-6),
    ("gather_masked", "num_prefix_tokens", 1),
    ("keep_visible", None, None),
    ("nearest_code", None, None),
    ("residual_add", None, None),
    ("residual_norm", "eps", 1e-6),
    ("restore_tokens", "num_patches", 4),
    ("token_loss", "label_smoothing", 0.1),
    ("token_loss", "ignore_index", -100),
]
"""Every argument that is a number or a bool, of every operator."""


def test_the_list_of_numbers_names_every_operator():
    assert {name for name, _, _ in NUMBERS} == set(CALLS)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "not learned"])
@pytest.mark.parametrize(("name", "argument", "value"), [entry for entry in NUMBERS if entry[1]])
def test_a_tensor_in_the_place_of_a_number_is_refused(name, argument, value, learned):
    given = torch.tensor(value)
    given.requires_grad_(learned and given.is_floating_point())
    with pytest.raises(TypeError, match=f"{name}: {argument} must be a Python number, but is a tensor; "):
        call(name, "auto", **{argument: given})


@pytest.mark.parametrize("impl", EVERY_IMPL)
@pytest.mark.parametrize("shape", [(), (2, 1, 1)], ids=["one", "one a head"])
@pytest.mark.parametrize("name", ["attention", "rel_pos_attention"])
def test_a_learned_scale_is_refused_with_what_to_do_instead(name, shape, impl):
    with pytest.raises(TypeError, match=r"scale must be a Python number, .*; multiply what is learned into q"):
        call(name, impl, scale=torch.nn.Parameter(torch.ones(shape)))


@pytest.mark.parametrize("impl", ["reference", TRITON])
def test_a_learned_scale_is_refused_where_it_is_compiled(impl):
    torch.compiler.reset()
    compiled = torch.compile(lambda scale: call("rel_pos_attention", impl, scale=scale), backend="aot_eager")
    with pytest.raises(TypeError, match="multiply what is learned into q"):
        compiled(torch.nn.Parameter(torch.ones(())))


def test_what_is_learned_can_be_multiplied_into_q():
    _, inputs = CALLS["attention"]
    temperature = torch.ones(2, 1, 1, requires_grad=True)
    attention(**inputs | {"q": inputs["q"] * temperature}, scale=1.0).square().sum().backward()
    assert temperature.grad.abs().min() > 0


def test_a_window_of_tensors_and_a_number_of_slots_in_a_tensor_are_refused():
    table = torch.zeros(num_relative_positions((2, 2)), 1)
    with pytest.raises(TypeError, match=r"window must be two Python numbers, but holds a tensor"):
        interpolate_table(table, (2, 2), torch.tensor([3, 3]))
    with pytest.raises(TypeError, match=r"cls_token must be a Python number, but is a tensor"):
        interpolate_table(table, (2, 2), (3, 3), torch.tensor(True))
    with pytest.raises(TypeError, match=r"num_slots must be a Python number, but is a tensor"):
        masked_positions_from_bool(torch.zeros(1, 4, dtype=torch.bool), torch.tensor(2))


@pytest.mark.parametrize(
    ("name", "argument", "index"),
    [
        ("embed_tokens", "mask_token", (None, None)),
        ("embed_tokens", "cls_token", (None, None)),
        ("embed_tokens", "pos_embed", (None,)),
        ("keep_visible", "cls_token", (None, None)),
        ("restore_tokens", "mask_token", (None, None)),
        ("rel_pos_attention", "bias", (None,)),
        ("attention", "bias", (None,)),
        ("token_loss", "hidden", (None,)),
    ],
)
def test_leading_axes_of_size_1_are_refused_with_the_index_that_takes_them_away(name, argument, index):
    tensor = CALLS[name][1][argument]
    wanted = rf"{argument}\[{', '.join('0' for _ in index)}\]"
    with pytest.raises(ValueError, match=rf"{argument} must have shape .*, but has \[1, .*; give {wanted}$"):
        call(name, "auto", **{argument: tensor[index]})


@pytest.mark.parametrize("name", ["residual_add", "residual_norm"])
def test_the_factors_of_timms_drop_path_are_refused_with_the_index_that_fits(name):
    keep = CALLS[name][1]["keep"][:, None, None]
    with pytest.raises(ValueError, match=r"keep must have shape \[2\], but has \[2, 1, 1\]; give keep\[:, 0, 0\]$"):
        call(name, "auto", keep=keep)


def test_no_index_is_named_where_none_fits():
    with pytest.raises(ValueError, match=r"cls_token must have shape \[8\], but has \[1, 1, 7\]$"):
        call("embed_tokens", "auto", cls_token=torch.zeros(1, 1, 7))


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((2, 1, 5, 5), r"one \[B, 1, N, N\] of other libraries is mask\[:, 0\]$"),
        ((2, 1, 1, 5), r"is mask\[:, 0\]$"),
        ((2, 2, 5, 5), r"what differs by head belongs into bias, \[H, N, N\]$"),
        ((2, 5), r"a mask \[B, N\] of keys is mask\[:, None\]$"),
    ],
)
def test_a_mask_of_another_shape_is_refused_with_the_way_to_one_that_serves(shape, hint):
    with pytest.raises(ValueError, match=hint):
        call("rel_pos_attention", "auto", mask=torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, (_, given) in CALLS.items() for argument in list(given)[:1]]
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64], ids=str)
def test_a_dtype_that_no_operator_computes_in_is_refused(name, argument, dtype):
    tensor = CALLS[name][1][argument].to(dtype)
    with pytest.raises(TypeError, match=f"must be a floating-point tensor, but is {dtype}; float64, float32"):
        call(name, "auto", **dict.fromkeys("qkv", tensor) if name == "attention" else {argument: tensor})


def test_a_dtype_asked_for_is_one_that_the_operators_compute_in():
    for ask in (RelativePositionBias((1, 2), 2), RelativePositionBias((1, 2), 2).shared):
        with pytest.raises(TypeError, match=r"dtype must be a floating-point one, but is torch.float8_e5m2; float64"):
            ask(torch.float8_e5m2)


def test_a_mask_in_float8_is_refused():
    with pytest.raises(TypeError, match=r"mask must be bool .* or floating point, but is torch.float8_e5m2"):
        call("rel_pos_attention", "auto", mask=torch.zeros(5, 5).to(torch.float8_e5m2))


@pytest.mark.parametrize(
    ("name", "argument", "found"),
    [
        ("embed_tokens", "mask_token", None),
        ("embed_tokens", "cls_token", None),
        ("token_loss", "weight", None),
        ("rel_pos_attention", "qkv", [1.0]),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(name, argument, found):
    kind = "None" if found is None else "a list"
    with pytest.raises(TypeError, match=rf"{name}: {argument} must be a tensor \[.*\], but is {kind}"):
        call(name, "auto", **{argument: found})


@pytest.mark.parametrize("impl", EVERY_IMPL)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(0, 8), (2, 0)])
def test_attention_without_heads_or_channels_is_refused(num_heads, head_dim, impl):
    why = f"must have at least 1 head of at least 1 channel, but has {num_heads} heads of {head_dim} channels"
    with pytest.raises(ValueError, match=f"qkv {why}"):
        rel_pos_attention(torch.zeros(1, 5, 3, num_heads, head_dim), None, impl=impl)
    with pytest.raises(ValueError, match=f"q {why}"):
        attention(*torch.zeros(3, 1, num_heads, 5, head_dim), impl=impl)


def test_a_bool_mask_in_the_place_of_positions_is_refused_with_what_converts_it():
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    inputs = CALLS["embed_tokens"][1]
    with pytest.raises(TypeError, match=r"but is torch.bool; masked_positions_from_bool\(mask\) makes"):
        embed_tokens(**inputs | {"masked_positions": mask})
    embed_tokens(**inputs | {"masked_positions": masked_positions_from_bool(mask)})


@pytest.mark.parametrize("impl", ["reference", TRITON])
@pytest.mark.parametrize("target", [0, 2])
def test_a_row_with_a_nan_among_its_logits_is_no_hit(target, impl):
    hidden, weight = torch.eye(3), torch.eye(3)
    hidden[0] = torch.nan  # all logits of this row are
    weight[2, 2] = torch.nan  # and one of every other row
    targets = torch.tensor([target, 1, target])
    assert not token_loss(hidden, weight, None, targets, reduction="none", impl=impl).accuracy.any()


def test_where_visible_patches_are_listed_the_mask_is_turned_round():
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    with pytest.raises(TypeError, match=r"masked_positions_from_bool\(~mask\) makes"):
        keep_visible(**CALLS["keep_visible"][1] | {"visible_positions": mask})


def test_a_number_of_slots_that_is_not_whole_is_refused():
    with pytest.raises(TypeError, match=r"num_slots must be a whole number, but is 2\.0"):
        masked_positions_from_bool(torch.ones(1, 2, dtype=torch.bool), num_slots=2.0)


def test_a_text_in_the_place_of_a_number_is_refused():
    with pytest.raises(TypeError, match="scale must be a number, but is 'x'"):
        attention(*torch.zeros(3, 1, 1, 5, 8), scale="x")
