"""The index of the best code for each row."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_beit.kernels import nearest_code
from fused_beit.kernels.nearest_code import reference
from fused_beit.kernels.testing import nearest_code_inputs


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finds_the_largest_score(dtype, with_bias):
    inputs = nearest_code_inputs(37, 16, 21, dtype=dtype) | ({} if with_bias else {"bias": None})
    index, score = nearest_code(**inputs)
    scores = inputs["x"].double() @ inputs["codes"].double().T
    if with_bias:
        scores += inputs["bias"].double()
    assert torch.equal(index, scores.argmax(-1))
    torch.testing.assert_close(score, scores.amax(-1).to(score.dtype))
    assert (index.dtype, score.dtype) == (torch.int64, torch.promote_types(dtype, torch.float32))


def test_with_minus_half_the_square_as_bias_it_is_the_nearest_in_distance():
    inputs = nearest_code_inputs(37, 4, 21, dtype=torch.float64)
    index, _ = nearest_code(inputs["x"], inputs["codes"], -inputs["codes"].square().sum(-1) / 2)
    assert torch.equal(index, torch.cdist(inputs["x"], inputs["codes"]).argmin(-1))


@pytest.mark.parametrize("num_codes", [2, 3, 17, 64, 1000, 8192])
def test_the_lowest_index_wins_ties(num_codes):
    # Every pair of equal best codes at least once, at places that a vectorised search would give to different lanes.
    generator = torch.Generator().manual_seed(0)
    num_rows = 200
    first = torch.randint(num_codes - 1, (num_rows,), generator=generator)
    second = first + 1 + (torch.rand(num_rows, generator=generator) * (num_codes - 1 - first)).long()
    codes = torch.zeros(num_codes, num_rows)
    codes[first, torch.arange(num_rows)] = 1
    codes[second, torch.arange(num_rows)] = 1
    assert torch.equal(nearest_code(torch.eye(num_rows), codes).index, first)
    assert not nearest_code(torch.zeros(3, 4), torch.ones(num_codes, 4)).index.any()


def test_rows_beyond_one_chunk_give_the_same(monkeypatch):
    inputs = nearest_code_inputs(37, 16, 21)
    whole = nearest_code(**inputs)
    for max_scores in (1, 21, 5 * 21 + 3):
        monkeypatch.setattr(reference, "MAX_SCORES", max_scores)
        index, score = nearest_code(**inputs)
        assert torch.equal(index, whole.index)
        torch.testing.assert_close(score, whole.score)


def test_the_product_is_never_held_whole():
    inputs = nearest_code_inputs(3000, 4, 4096)
    with LargestTensor() as largest:
        nearest_code(**inputs)
    assert 0 < largest.numel <= reference.MAX_SCORES < 3000 * 4096


def test_no_rows_give_no_indices():
    index, score = nearest_code(**nearest_code_inputs(0, 4, 5))
    assert (index.shape, index.dtype, score.shape) == ((0,), torch.int64, (0,))


def test_autocast_does_not_narrow_the_scores():
    inputs = nearest_code_inputs(37, 16, 21)
    plain = nearest_code(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        index, score = nearest_code(**inputs)
    assert torch.equal(index, plain.index)
    assert torch.equal(score, plain.score)


def test_has_no_gradient():
    codes = nn.Parameter(torch.randn(5, 4))
    assert not nearest_code(torch.randn(3, 4), codes).score.requires_grad


def test_passes_opcheck():
    inputs = nearest_code_inputs(5, 4, 6)
    torch.library.opcheck(torch.ops.fused_beit.nearest_code.default, (*inputs.values(), "reference"))


def test_compiles_without_a_graph_break():
    inputs = nearest_code_inputs(5, 4, 6)
    torch.compiler.reset()
    compiled = torch.compile(nearest_code, fullgraph=True, backend="aot_eager")(**inputs)
    assert torch.equal(compiled.index, nearest_code(**inputs).index)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"x must have shape \[R, D\], but has \[4\]"),
        ({"codes": torch.zeros(6, 5)}, ValueError, r"codes must have shape \[K, 4\], but has \[6, 5\]"),
        ({"codes": torch.zeros(0, 4)}, ValueError, r"codes must have at least 1 row, but has shape \[0, 4\]"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \[6\], but has \[5\]"),
        ({"x": torch.zeros(5, 4).long()}, TypeError, r"x must be a floating-point tensor, but is torch.int64"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(change, error, message):
    with pytest.raises(error, match=message):
        nearest_code(**nearest_code_inputs(5, 4, 6) | change)
