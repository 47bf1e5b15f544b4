"""The relative position table: its row order, its expansion, its gradient."""

import pytest
import torch

from fused_beit.kernels import RelativePositionBias, relative_position_index
from fused_beit.kernels.rel_pos_attention.bias import expand_table, num_relative_positions

WINDOWS = [(1, 1), (2, 2), (3, 2), (2, 5), (14, 14)]


def index_by_loops(window, cls_token):
    height, width = window
    first = int(cls_token)
    num_rows = (2 * height - 1) * (2 * width - 1) + 3 * first
    index = torch.zeros(height * width + first, height * width + first, dtype=torch.int64)
    for query in range(height * width):
        for key in range(height * width):
            dy, dx = query // width - key // width, query % width - key % width
            index[query + first, key + first] = (dy + height - 1) * (2 * width - 1) + dx + width - 1
    if cls_token:
        index[0, 1:], index[1:, 0], index[0, 0] = num_rows - 3, num_rows - 2, num_rows - 1
    return index


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_index_equals_the_definition_written_as_loops(window, cls_token):
    assert torch.equal(relative_position_index(window, cls_token), index_by_loops(window, cls_token))


@pytest.mark.parametrize("window", WINDOWS)
def test_index_equals_that_of_transformers_beit(window):
    beit = pytest.importorskip("transformers.models.beit.modeling_beit")
    theirs = beit.BeitRelativePositionBias.generate_relative_position_index(window)
    assert torch.equal(relative_position_index(window), theirs)


@pytest.mark.parametrize(("window", "rows"), [((14, 14), 732), ((24, 24), 2212), ((32, 32), 3972), ((40, 40), 6244)])
def test_published_numbers_of_rows(window, rows):
    assert num_relative_positions(window) == rows
    assert RelativePositionBias(window, 1).relative_position_bias_table.shape == (rows, 1)


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("window", WINDOWS[:4])
def test_every_row_is_used(window, cls_token):
    index = relative_position_index(window, cls_token)
    assert index.unique().tolist() == list(range(num_relative_positions(window, cls_token)))


def test_starts_at_zero():
    assert torch.equal(RelativePositionBias((3, 2), 4)(), torch.zeros(4, 7, 7))


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_dense_bias_is_the_table_at_the_index_head_first(window, cls_token):
    module = RelativePositionBias(window, 3, cls_token)
    torch.nn.init.normal_(module.relative_position_bias_table)
    bias = module()
    assert bias.is_contiguous()
    index = relative_position_index(window, cls_token)
    assert torch.equal(bias, module.relative_position_bias_table[index].permute(2, 0, 1))


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("window", [(1, 1), (2, 3)])
def test_gradients_pass_gradcheck(window, cls_token):
    table = torch.randn(num_relative_positions(window, cls_token), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda table: expand_table(table, window, cls_token), table)


def test_gradient_is_the_sum_over_the_pairs_of_each_row():
    module = RelativePositionBias((2, 3), 2).double()
    grad = torch.randn(2, 7, 7, dtype=torch.float64)
    module().backward(grad)
    expected = torch.zeros(num_relative_positions((2, 3)), 2, dtype=torch.float64)
    index = relative_position_index((2, 3))
    for query in range(7):
        for key in range(7):
            expected[index[query, key]] += grad[:, query, key]
    torch.testing.assert_close(module.relative_position_bias_table.grad, expected)


def test_the_state_dict_is_the_table_alone():
    assert list(RelativePositionBias((2, 2), 1).state_dict()) == ["relative_position_bias_table"]


def test_works_where_deterministic_algorithms_are_demanded():
    module = RelativePositionBias((2, 2), 2)
    torch.use_deterministic_algorithms(True)
    try:
        module().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert module.relative_position_bias_table.grad.sum() == 2 * 5 * 5


def test_compiles_without_a_graph_break():
    module = RelativePositionBias((2, 2), 2)
    torch.nn.init.normal_(module.relative_position_bias_table)
    torch.compiler.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(), module())


@pytest.mark.parametrize(("window", "num_heads"), [((0, 2), 1), ((2,), 1), ((2, 2), 0)])
def test_an_impossible_window_is_refused(window, num_heads):
    with pytest.raises(ValueError, match="all at least 1, but got"):
        RelativePositionBias(window, num_heads)
