"""The table of another window, against the published rule written out and scipy's splines."""

import numpy as np
import pytest
import torch

from fused_beit.kernels.rel_pos_attention.bias import num_relative_positions
from fused_beit.kernels.rel_pos_attention.interpolation import METHODS, interpolate_table


def table_of(window, cls_token=True, num_heads=2, dtype=torch.float64):
    return torch.randn(num_relative_positions(window, cls_token), num_heads).to(dtype)


def as_grid(table, window):
    """[2 Wh - 1, 2 Ww - 1, H], without the rows of a CLS token."""
    height, width = (2 * side - 1 for side in window)
    return table[: height * width].unflatten(0, (height, width))


def published_coordinates(side, new_side):
    """Where the old offsets of an axis lie among the new ones."""
    if side == new_side:
        return np.arange(1.0 - side, side)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (side - 1)) / (1 - q) > new_side - 1:
            high = q
        else:
            low = q
    positive = [sum(q**k for k in range(n)) for n in range(1, side)]
    return np.array([-x for x in reversed(positive)] + [0.0] + positive)


@pytest.mark.parametrize(
    ("window", "new_window"),
    [
        ((14, 14), (24, 24)),
        ((14, 14), (32, 32)),
        ((14, 14), (15, 15)),
        ((14, 7), (20, 30)),
        ((14, 14), (14, 24)),
        ((3, 3), (9, 9)),
        ((14, 14), (7, 9)),
        ((14, 14), (13, 13)),
    ],
)
def test_geometric_equals_the_published_rule_with_scipys_splines(window, new_window):
    interpolate = pytest.importorskip("scipy.interpolate")
    table = table_of(window)
    found = as_grid(interpolate_table(table, window, new_window), new_window)
    y, x = (published_coordinates(*sides) for sides in zip(window, new_window, strict=True))
    new_y, new_x = (np.arange(1.0 - side, side) for side in new_window)
    for head, values in enumerate(as_grid(table, window).unbind(2)):
        spline = interpolate.RectBivariateSpline(y, x, values.numpy(), kx=3, ky=3, s=0)
        torch.testing.assert_close(found[:, :, head], torch.from_numpy(spline(new_y, new_x)), rtol=0, atol=1e-13)


def test_uniform_reproduces_a_cubic_in_the_stretched_offsets():
    def cubic(y, x):
        return (2 - y + 3 * y**3)[:, None] * (1 + x - x**2 + x**3)[None, :]

    window, new_window = (5, 4), (8, 3)
    old = [torch.linspace(-1, 1, 2 * side - 1, dtype=torch.float64) for side in window]
    new = [torch.linspace(-1, 1, 2 * side - 1, dtype=torch.float64) for side in new_window]
    table = cubic(*old).flatten()[:, None]
    found = interpolate_table(table, window, new_window, cls_token=False, method="uniform")
    torch.testing.assert_close(found, cubic(*new).flatten()[:, None])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("window", [(1, 1), (3, 5), (14, 14)])
def test_the_same_window_gives_the_table_bit_for_bit(window, dtype, method):
    table = table_of(window, dtype=dtype)
    found = interpolate_table(table, window, window, method=method)
    assert torch.equal(found, table)
    assert found.dtype == dtype
    assert found.data_ptr() != table.data_ptr()


@pytest.mark.parametrize("method", METHODS)
def test_the_rows_of_a_cls_token_are_copied(method):
    table = table_of((3, 4), dtype=torch.float32)
    found = interpolate_table(table, (3, 4), (6, 5), method=method)
    assert found.shape == (num_relative_positions((6, 5)), 2)
    assert torch.equal(found[-3:], table[-3:])


@pytest.mark.parametrize("method", METHODS)
def test_the_bias_at_no_offset_is_kept(method):
    table = table_of((4, 3))
    found = interpolate_table(table, (4, 3), (9, 8), method=method)
    torch.testing.assert_close(as_grid(found, (9, 8))[8, 7], as_grid(table, (4, 3))[3, 2])


@pytest.mark.parametrize("method", METHODS)
def test_a_window_of_one_patch_gives_its_bias_to_every_offset(method):
    table = table_of((1, 1), cls_token=False)
    found = interpolate_table(table, (1, 1), (2, 3), cls_token=False, method=method)
    assert torch.equal(found, table.expand(15, 2))


@pytest.mark.parametrize("method", METHODS)
def test_a_new_window_of_one_patch_takes_the_bias_at_no_offset(method):
    table = table_of((3, 2), cls_token=False)
    found = interpolate_table(table, (3, 2), (1, 1), cls_token=False, method=method)
    assert torch.equal(found, as_grid(table, (3, 2))[2, 1][None])


def test_three_offsets_lie_on_a_parabola():
    offsets = torch.arange(-4.0, 5.0, dtype=torch.float64)
    table = (offsets[[0, 4, 8]] ** 2).expand(1, 3).T
    found = interpolate_table(table, (2, 1), (5, 1), cls_token=False, method="uniform")
    torch.testing.assert_close(found[:, 0], offsets**2)


def test_offsets_beyond_the_reach_of_the_progression_repeat_the_outermost_bias():
    table = torch.tensor([[3.0], [1.0], [2.0]])
    found = interpolate_table(table, (2, 1), (4, 1), cls_token=False)
    assert found[:, 0].tolist() == [3, 3, 3, 1, 2, 2, 2]


def test_a_table_of_another_window_is_refused():
    with pytest.raises(ValueError, match=r"table must have shape \[38, H\], but has \[35, 2\]"):
        interpolate_table(torch.zeros(35, 2), (3, 4), (6, 6))


def test_a_table_of_integers_is_refused():
    with pytest.raises(TypeError, match=r"floating-point tensor, but is torch\.int64"):
        interpolate_table(torch.zeros(12, 2, dtype=torch.int64), (2, 2), (3, 3))


@pytest.mark.parametrize(("window", "new_window"), [((0, 2), (2, 2)), ((2, 2), (2,)), ((2, 2), (2, -1))])
def test_an_impossible_window_is_refused(window, new_window):
    with pytest.raises(ValueError, match="a window of two sides, both at least 1, but got"):
        interpolate_table(torch.zeros(12, 2), window, new_window)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="geometric, uniform, but got 'bilinear'"):
        interpolate_table(torch.zeros(12, 2), (2, 2), (3, 3), method="bilinear")
