"""A table of relative position biases for another window: fine-tuning at another resolution than pre-training's."""

import torch
from torch import Tensor

from ..tracing import fx_leaf
from ..validation import check_float, check_number, check_shape
from .bias import check_window, num_relative_positions

METHODS = ("geometric", "uniform")


@fx_leaf
def interpolate_table(
    table: Tensor,
    window: tuple[int, int],
    new_window: tuple[int, int],
    cls_token: bool = True,
    method: str = "geometric",
) -> Tensor:
    """The biases of a table at the offsets of another window.

    table:      [R, H]    floating point, of `window` = (Wh, Ww), any sides
    new_window: (Wh', Ww')
    cls_token:  whether the last three of R rows are those of a CLS token; they are copied
    method:     "geometric"  an axis of W patches has its old offsets at the sums 0, ±1, ±(1 + q), ±(1 + q + q²), ...,
                             where q makes the last one W' - 1: near offsets keep their biases, far ones are spread
                "uniform"    it has them at equal steps from -(W' - 1) to W' - 1: all offsets are stretched alike
    ->          [R', H]   a new tensor of the table's dtype

    The new biases are those at the whole offsets, on the bicubic interpolating spline (not-a-knot) of each head,
    computed in float64. An axis whose side does not change keeps its offsets, and equal windows the table bit for bit.

    As published, q is sought between 1.01 and 1.5. So a smaller window takes the middle of the table, nearly unchanged
    (q = 1.01), and one too large for q = 1.5 repeats the outermost biases; so do offsets beyond the last old one in
    general. An axis of fewer than 4 offsets cannot have a cubic: three (a side of 2) lie on a parabola, and one (a side
    of 1) is a constant.

    Raises ValueError for a table that is not of `window`, an impossible window or an unknown method; TypeError for one
    that is not floating point.
    Source: the fine-tuning of BEiT (arXiv:2106.08254) as released in github.com/microsoft/unilm, beit, which does this
    for square windows with scipy's interp2d (FITPACK's regrid_smth without smoothing).
    """
    name = "interpolate_table"
    window, new_window = check_window(name, window), check_window(name, new_window)
    check_number(name, cls_token=cls_token)
    if method not in METHODS:
        raise ValueError(f"{name}: expected method to be one of {', '.join(METHODS)}, but got {method!r}")
    check_shape(name, "table", table, num_relative_positions(window, cls_token), "H")
    check_float(name, table=table)
    if window == new_window:
        return table.clone()
    num_offsets = num_relative_positions(window, cls_token=False)
    offsets_YXH = table[:num_offsets].double().unflatten(0, (2 * window[0] - 1, 2 * window[1] - 1))
    with torch.device("cpu"):  # their knots are looked at, whatever the default device is
        y_matrix, x_matrix = (
            _axis_matrix(side, new_side, method) for side, new_side in zip(window, new_window, strict=True)
        )
    y_matrix, x_matrix = y_matrix.to(table.device), x_matrix.to(table.device)
    new_offsets_YXH = torch.einsum("ay,bx,yxh->abh", y_matrix, x_matrix, offsets_YXH)
    return torch.cat([new_offsets_YXH.flatten(0, 1).to(table.dtype), table[num_offsets:]])


def _axis_matrix(side: int, new_side: int, method: str) -> Tensor:
    """float64 [2 new_side - 1, 2 side - 1]: what takes the biases along one axis to those of the new offsets."""
    if side == new_side:
        return torch.eye(2 * side - 1, dtype=torch.float64)
    if new_side == 1:
        return torch.eye(2 * side - 1, dtype=torch.float64)[side - 1 : side]
    reach = new_side - 1
    if method == "geometric":
        outward = _geometric_ratio(side - 1, reach) ** torch.arange(side - 1, dtype=torch.float64)
        positive = outward.cumsum(0)
        old = torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])
    else:
        old = torch.arange(1 - side, side, dtype=torch.float64) * (reach / max(side - 1, 1))
    new = torch.arange(-reach, reach + 1, dtype=torch.float64)
    return _spline_matrix(old, new)


def _geometric_ratio(num_steps: int, reach: int) -> float:
    """q in 1.01..1.5, to 1e-6, with 1 + q + ... + q^(num_steps - 1) = reach; the nearer end where none is there."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (q**num_steps - 1) / (q - 1) > reach:
            high = q
        else:
            low = q
    return q


def _spline_matrix(old: Tensor, new: Tensor) -> Tensor:
    """[len(new), len(old)]: from values at `old` to those at `new` of the interpolating spline, constant outside it.

    Degree 3, or one less than the number of values. The first and last inner point is no knot, as in FITPACK. The
    spline's coefficients c solve B(old) c = values, so the matrix is B(new) B(old)^-1.
    """
    degree = min(3, len(old) - 1)
    inner = old[2:-2] if degree == 3 else old[:0]
    knots = torch.cat([old[:1].expand(degree + 1), inner, old[-1:].expand(degree + 1)])
    new = new.clamp(old[0].item(), old[-1].item())
    return torch.linalg.solve(_b_splines(old, knots, degree), _b_splines(new, knots, degree), left=False)


def _b_splines(x: Tensor, knots: Tensor, degree: int) -> Tensor:
    """[len(x), len(knots) - degree - 1]: every B-spline at every x, by the recursion of Cox and de Boor."""
    x = x[:, None]
    # Intervals hold their left end; the last one that is not empty holds both.
    last = len(knots) - degree - 2
    basis = ((knots[:-1] <= x) & (x < knots[1:])).double()
    basis[:, last] += x[:, 0] == knots[-1]
    for d in range(1, degree + 1):
        width = knots[d:] - knots[:-d]
        rising = torch.where(width > 0, (x - knots[:-d]) / width, 0.0)
        basis = rising[:, :-1] * basis[:, :-1] + (1 - rising)[:, 1:] * basis[:, 1:]
    return basis
