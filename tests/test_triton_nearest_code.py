"""The Triton search for the best code, in Triton's interpreter: it equals the reference, tile after tile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_families import NEEDS_INTERPRETER, exact_products  # noqa: F401

from fused_beit.kernels import ImplUnavailable, nearest_code
from fused_beit.kernels._triton import target
from fused_beit.kernels.nearest_code import launch
from fused_beit.kernels.testing import assert_no_worse_than_eager, nearest_code_inputs

pytestmark = NEEDS_INTERPRETER

# bf16 is not here: the interpreter computes it wrongly.
DTYPES = [torch.float64, torch.float32, torch.float16]
FAMILIES = ["pointer", "tma"]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    """Each family of loads in turn, with tiles of 16 rows, 32 codes and 16 channels."""
    tile = launch.Tile(16, 32, 16, 4, 1)
    monkeypatch.setattr(launch, "tile_of", lambda *_: tile)
    if request.param == "tma":
        monkeypatch.setattr(launch, "uses_tma", lambda arch, *tensors: launch.tma_can_read(*tensors))
    return request.param


@pytest.fixture(params=[1, 1024], ids=["whole", "split"])
def split(request, monkeypatch):
    """All codes by one program, and a program for each tile of codes."""
    monkeypatch.setattr(launch, "PROGRAMS", request.param)


def ours(x, codes, bias=None):
    return nearest_code(x, codes, bias, impl="triton")


def reference(x, codes, bias=None):
    return nearest_code(x, codes, bias, impl="reference")


def assert_equals_the_reference(inputs):
    """The same codes, and scores by the rule of fused_beit.kernels.testing."""
    found, eager = ours(**inputs), reference(**inputs)
    exact = reference(**{name: None if tensor is None else tensor.double() for name, tensor in inputs.items()})
    assert torch.equal(found.index, exact.index)
    assert found.index.dtype == torch.int64
    if found.score.dtype == torch.float64:
        torch.testing.assert_close(found.score, exact.score, rtol=1e-13, atol=1e-13)
    else:
        assert_no_worse_than_eager("score", found.score, eager.score, exact.score)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finds_the_largest_score(family, split, dtype, with_bias):
    inputs = nearest_code_inputs(19, 16, 70, dtype=dtype) | ({} if with_bias else {"bias": None})
    assert_equals_the_reference(inputs)


@pytest.mark.parametrize(("num_rows", "width", "num_codes"), [(1, 1, 1), (1, 5, 33), (17, 40, 32), (3, 72, 65)])
def test_any_size_equals_the_reference(family, num_rows, width, num_codes):
    assert_equals_the_reference(nearest_code_inputs(num_rows, width, num_codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_pinned_tiles_equal_the_reference(dtype):
    assert_equals_the_reference(nearest_code_inputs(3, 72, 300, dtype=dtype))


def test_with_minus_half_the_square_as_bias_it_is_the_nearest_in_distance(family):
    inputs = nearest_code_inputs(19, 8, 70, dtype=torch.float64)
    index, _ = ours(inputs["x"], inputs["codes"], -inputs["codes"].square().sum(-1) / 2)
    assert torch.equal(index, torch.cdist(inputs["x"], inputs["codes"]).argmin(-1))


@pytest.mark.parametrize("second", [1, 31, 32, 69], ids=lambda second: f"0 and {second}")
def test_the_lowest_index_wins_ties(family, split, second):
    codes = torch.zeros(70, 16)
    codes[0] = codes[second] = 1
    assert ours(torch.ones(1, 16), codes).index.tolist() == [0]
    codes[0] = 0
    assert ours(torch.ones(1, 16), codes).index.tolist() == [second]


def test_scores_that_are_all_negative_do_not_lose_to_the_codes_past_the_end(family, split):
    found = ours(torch.ones(2, 16), -torch.ones(33, 16))
    assert found.index.tolist() == [0, 0]
    assert found.score.tolist() == [-16, -16]


def test_scores_of_minus_infinity_give_the_first_code(family, split):
    found = ours(torch.ones(2, 16), torch.ones(70, 16), torch.full((70,), -INF))
    assert found.index.tolist() == [0, 0]
    assert found.score.tolist() == [-INF, -INF]


@pytest.mark.parametrize(("at", "first"), [([3], 3), ([40], 40), ([69, 40], 40), ([0, 69], 0)])
def test_the_first_nan_wins_over_everything(family, split, at, first):
    bias = torch.arange(70.0)
    bias[50] = INF
    bias[at] = NAN
    found, expected = (
        ours(torch.ones(2, 16), torch.ones(70, 16), bias),
        reference(torch.ones(2, 16), torch.ones(70, 16), bias),
    )
    assert found.index.tolist() == expected.index.tolist() == [first, first]
    assert found.score.isnan().all()


def test_a_row_of_nan_does_not_touch_the_others(family):
    inputs = nearest_code_inputs(5, 16, 70)
    inputs["x"][2] = NAN
    found, expected = ours(**inputs), reference(**inputs)
    assert found.index.tolist() == expected.index.tolist()
    assert found.score.isnan().tolist() == [False, False, True, False, False]


def test_half_precision_is_summed_in_fp32():
    # 2048 + 1 is not a number of fp16.
    x = torch.tensor([[2048.0, 1.0]], dtype=torch.float16)
    codes = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float16)
    found = ours(x, codes)
    assert (found.index.item(), found.score.item()) == (1, 2049.0)


def test_codes_of_another_dtype_are_not_rounded():
    inputs = nearest_code_inputs(5, 16, 70)
    inputs["x"] = inputs["x"].half()
    assert_equals_the_reference(inputs)


def test_autocast_does_not_narrow_the_scores():
    inputs = nearest_code_inputs(5, 16, 21)
    plain = ours(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(**inputs)
    assert torch.equal(found.index, plain.index)
    assert torch.equal(found.score, plain.score)


@pytest.mark.parametrize("name", ["x", "codes"])
def test_inputs_may_have_any_strides(family, name):
    inputs = nearest_code_inputs(19, 16, 70, dtype=torch.float64)
    inputs[name] = inputs[name].t().contiguous().t()
    assert_equals_the_reference(inputs)


def test_no_rows_give_no_indices():
    index, score = ours(**nearest_code_inputs(0, 4, 5))
    assert (index.shape, index.dtype, score.shape) == ((0,), torch.int64, (0,))


def test_has_no_gradient():
    codes = torch.randn(5, 4, requires_grad=True)
    assert not ours(torch.randn(3, 4), codes).score.requires_grad


def test_bf16_is_refused_in_the_interpreter():
    with pytest.raises(ImplUnavailable, match=r"nearest_code: impl='triton'.*computes bfloat16 wrongly"):
        ours(**nearest_code_inputs(3, 4, 5, dtype=torch.bfloat16))


def test_its_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.fused_beit.nearest_code_fwd.default, tuple(nearest_code_inputs(5, 4, 6).values()))


def test_auto_on_cuda_compiles_without_a_graph_break():
    """On tensors without memory, as those of an H100: Dynamo cannot trace what `auto` asks."""
    with FakeTensorMode(), target.pretending("sm_90"):
        x, codes = (torch.empty(rows, 64, dtype=torch.bfloat16, device="cuda") for rows in (5, 9))
        index, score = torch.compile(nearest_code, fullgraph=True, backend="eager")(x, codes)
    assert (index.dtype, score.dtype, index.shape) == (torch.int64, torch.float32, (5,))


def test_compiles_without_a_graph_break():
    inputs = nearest_code_inputs(5, 4, 6)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(**inputs)
    assert torch.equal(compiled.index, ours(**inputs).index)
