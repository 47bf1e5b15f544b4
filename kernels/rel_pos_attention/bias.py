"""The learned relative position bias: a small table, its expansion to one bias per head, query and key, and back.

H heads, N tokens, P patches, R rows of the table; (Wh, Ww) the window, in patches.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from .._triton.descriptors import align_rows, padded_length
from .._triton.target import why_unavailable
from ..differentiation import refuse_other_derivatives, register_gradient
from ..impl import AUTO, Impl, ImplUnavailable, Operator, refusal
from ..precision import accumulate_dtype
from ..tracing import fx_leaf
from ..validation import check_float, check_float_dtype, check_number, check_shape


def num_relative_positions(window: tuple[int, int], cls_token: bool = True) -> int:
    """Rows of the table: (2 Wh - 1)(2 Ww - 1) offsets, and three more with a CLS token."""
    height, width = window
    return (2 * height - 1) * (2 * width - 1) + (3 if cls_token else 0)


def relative_position_index(window: tuple[int, int], cls_token: bool = True) -> Tensor:
    """Row of the table for each query and key: int64 [N, N] with N = Wh*Ww, plus 1 with a CLS token (token 0).

    Patches i, j with offset d = position(i) - position(j) use row (dy + Wh - 1)(2 Ww - 1) + (dx + Ww - 1). The last
    three of R rows are CLS -> patch (R-3), patch -> CLS (R-2) and CLS -> CLS (R-1).
    Source: Swin (arXiv:2103.14030) section 3.2; the CLS rows as in the released code of BEiT (arXiv:2106.08254).
    """
    height, width = window
    patch = torch.arange(height * width)
    y, x = patch // width, patch % width
    dy_NN = y[:, None] - y[None, :] + height - 1
    dx_NN = x[:, None] - x[None, :] + width - 1
    index_NN = dy_NN * (2 * width - 1) + dx_NN
    if not cls_token:
        return index_NN
    num_rows = num_relative_positions(window)
    index_NN = F.pad(index_NN, (1, 0, 1, 0))
    index_NN[0, :] = num_rows - 3
    index_NN[:, 0] = num_rows - 2
    index_NN[0, 0] = num_rows - 1
    return index_NN


def check_window(name: str, window: Any) -> tuple[int, int]:
    """The window as two ints. Raises ValueError unless it has two sides of at least 1, TypeError for tensors."""
    if isinstance(window, Tensor) or any(isinstance(side, Tensor) for side in window):
        raise TypeError(f"{name}: window must be two Python numbers, but holds a tensor; .tolist() gives numbers")
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"{name}: expected a window of two sides, both at least 1, but got {tuple(window)}")
    return int(window[0]), int(window[1])


def _num_tokens(window: Sequence[int], cls_token: bool) -> int:
    return window[0] * window[1] + int(cls_token)


def _expand_reference(table_RH: Tensor, window: Sequence[int], cls_token: bool, dtype: torch.dtype) -> Tensor:
    # Made from sliding windows and not from the index: a patch's row of biases is a Wh x Ww window of the offsets. The
    # gradient then sums windows in a fixed order, where that of an indexing would be free to use atomics on CUDA.
    height, width = window
    table_HR = table_RH.to(accumulate_dtype(table_RH.dtype)).t().contiguous()
    num_offsets = (2 * height - 1) * (2 * width - 1)
    offsets_HYX = table_HR[:, :num_offsets].unflatten(1, (2 * height - 1, 2 * width - 1))
    # The window of query (y, x) starts at (y, x) and holds the keys backwards, since an offset is query minus key.
    windows_HyxYX = offsets_HYX.unfold(1, height, 1).unfold(2, width, 1).flip(3, 4)
    bias_HNN = windows_HyxYX.reshape(-1, height * width, height * width)
    if cls_token:
        num_heads, num_patches, _ = bias_HNN.shape
        cls_to_patch, patch_to_cls, cls_to_cls = table_HR[:, num_offsets:, None, None].unbind(1)
        first_row = torch.cat([cls_to_cls, cls_to_patch.expand(num_heads, 1, num_patches)], dim=2)
        other_rows = torch.cat([patch_to_cls.expand(num_heads, num_patches, 1), bias_HNN], dim=2)
        bias_HNN = torch.cat([first_row, other_rows], dim=1)
    num_tokens = bias_HNN.shape[2]
    padding = padded_length(num_tokens) - num_tokens
    bias_HNN = bias_HNN.to(dtype)
    return F.pad(bias_HNN, (0, padding))[:, :, :num_tokens] if padding else bias_HNN


def _scatter_reference(grad_HNN: Tensor, window: Sequence[int], cls_token: bool, dtype: torch.dtype) -> Tensor:
    # The gradient of _expand_reference, as torch's autograd computes it.
    height, width = window
    num_heads = grad_HNN.shape[0]
    grad_HNN = grad_HNN.to(accumulate_dtype(grad_HNN.dtype))
    first = int(cls_token)
    windows_HyxYX = grad_HNN[:, first:, first:].reshape(num_heads, height, width, height, width).flip(3, 4)
    rows_HyXY = torch.ops.aten.unfold_backward(
        windows_HyxYX, [num_heads, height, 2 * width - 1, height], dim=2, size=width, step=1
    )
    offsets_HYX = torch.ops.aten.unfold_backward(
        rows_HyXY, [num_heads, 2 * height - 1, 2 * width - 1], dim=1, size=height, step=1
    )
    table_HR = offsets_HYX.flatten(1)
    if cls_token:
        cls_H3 = torch.stack([grad_HNN[:, 0, 1:].sum(1), grad_HNN[:, 1:, 0].sum(1), grad_HNN[:, 0, 0]], dim=1)
        table_HR = torch.cat([table_HR, cls_H3], dim=1)
    return table_HR.t().contiguous().to(dtype)


def _refuse_where_unavailable(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    why = why_unavailable(tensor.device, tensor.dtype, dtype)
    if why is not None:
        raise ImplUnavailable(refusal(name, Impl.TRITON, why))
    refuse_other_derivatives(name, tensor)


def _expand_triton(table_RH: Tensor, window: Sequence[int], cls_token: bool, dtype: torch.dtype) -> Tensor:
    _refuse_where_unavailable("expand_table", table_RH, dtype)
    return torch.ops.fused_beit.expand_table_triton(table_RH, window, cls_token, dtype)


def _scatter_triton(grad_HNN: Tensor, window: Sequence[int], cls_token: bool, dtype: torch.dtype) -> Tensor:
    _refuse_where_unavailable("scatter_table", grad_HNN, dtype)
    return torch.ops.fused_beit.scatter_table_triton(grad_HNN, window, cls_token, dtype)


def _empty_bias(table_RH: Tensor, window: Sequence[int], cls_token: bool, dtype: torch.dtype) -> Tensor:
    num_tokens = _num_tokens(window, cls_token)
    row_stride = padded_length(num_tokens)
    return table_RH.new_empty(table_RH.shape[1], num_tokens, row_stride, dtype=dtype)[:, :, :num_tokens]


def _empty_table(grad_HNN: Tensor, window: Sequence[int], cls_token: bool, dtype: torch.dtype) -> Tensor:
    return grad_HNN.new_empty(num_relative_positions((window[0], window[1]), cls_token), grad_HNN.shape[0], dtype=dtype)


def _run_expand(table_RH: Tensor, window: Sequence[int], cls_token: bool, dtype: torch.dtype) -> Tensor:
    from .table_kernels import launch_expand

    bias_HNN = _empty_bias(table_RH, window, cls_token, dtype)
    launch_expand(table_RH, bias_HNN, (window[0], window[1]), cls_token)
    return bias_HNN


def _run_scatter(grad_HNN: Tensor, window: Sequence[int], cls_token: bool, dtype: torch.dtype) -> Tensor:
    from .table_kernels import launch_scatter

    sums_RH = _empty_table(grad_HNN, window, cls_token, accumulate_dtype(grad_HNN.dtype))
    launch_scatter(grad_HNN, sums_RH, (window[0], window[1]), cls_token)
    return sums_RH.to(dtype)


def _save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensor, window, cls_token, _ = inputs
    ctx.arguments = window, cls_token, tensor.dtype


def _expand_backward(ctx: Any, grad_HNN: Tensor) -> tuple[Tensor | None, ...]:
    return _scatter_triton(grad_HNN, *ctx.arguments), None, None, None


def _scatter_backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor | None, ...]:
    return _expand_triton(grad_RH, *ctx.arguments), None, None, None


EXPAND = Operator(
    "expand_table(Tensor table, int[] window, bool cls_token, ScalarType dtype, str impl) -> Tensor",
    {Impl.REFERENCE: _expand_reference, Impl.TRITON: _expand_triton},
    requirements={Impl.TRITON: why_unavailable},
)
SCATTER = Operator(
    "scatter_table(Tensor grad, int[] window, bool cls_token, ScalarType dtype, str impl) -> Tensor",
    {Impl.REFERENCE: _scatter_reference, Impl.TRITON: _scatter_triton},
    requirements={Impl.TRITON: why_unavailable},
)

if not hasattr(torch.ops.fused_beit, "expand_table_triton"):  # once only, as in impl.py
    for _name, _argument, _kernel, _fake, _gradient in (
        ("expand_table_triton", "table", _run_expand, _empty_bias, _expand_backward),
        ("scatter_table_triton", "grad", _run_scatter, _empty_table, _scatter_backward),
    ):
        _schema = f"(Tensor {_argument}, int[] window, bool cls_token, ScalarType dtype) -> Tensor"
        torch.library.define(f"fused_beit::{_name}", _schema)
        torch.library.impl(f"fused_beit::{_name}", ("cpu", "cuda"), _kernel)
        torch.library.register_fake(f"fused_beit::{_name}", _fake)
        register_gradient(_name, _gradient, _save_arguments)


@fx_leaf
def expand_table(
    table: Tensor,
    window: tuple[int, int],
    cls_token: bool = True,
    dtype: torch.dtype | None = None,
    impl: str | Impl = AUTO,
) -> Tensor:
    """The dense bias of a table: table[relative_position_index(window, cls_token)], head first.

    table: [R, H]     floating point
    dtype: of the result, that of the table when None
    ->     [H, N, N]  with strides (N*LD, LD, 1), LD being N rounded up to a multiple of 16, which the kernels load
                      without a copy; what lies between the rows is zero

    The gradient is summed in fp32 (float64 for float64), in a fixed order.
    Raises ValueError or TypeError for wrong shapes or dtypes, ImplUnavailable for an `impl` that cannot run.
    Source: Swin (arXiv:2103.14030) section 3.2, BEiT (arXiv:2106.08254).
    """
    name = "expand_table"
    window = check_window(name, window)
    check_number(name, cls_token=cls_token)
    check_shape(name, "table", table, num_relative_positions(window, cls_token), "H")
    check_float(name, table=table)
    dtype = table.dtype if dtype is None else dtype
    check_float_dtype(name, dtype)
    resolved = EXPAND.resolve(impl, table.device)
    return torch.ops.fused_beit.expand_table(table, window, cls_token, dtype, resolved.impl.value)


@fx_leaf
def scatter_table(
    grad: Tensor,
    window: tuple[int, int],
    cls_token: bool = True,
    dtype: torch.dtype | None = None,
    impl: str | Impl = AUTO,
) -> Tensor:
    """The gradient of a table from that of its dense bias: for each row, the sum over the pairs that use it.

    grad:  [H, N, N]  floating point, of any strides
    dtype: of the result, that of the gradient when None
    ->     [R, H]     summed in fp32 (float64 for float64), in a fixed order

    Raises as `expand_table` does.
    """
    name = "scatter_table"
    window = check_window(name, window)
    check_number(name, cls_token=cls_token)
    num_tokens = _num_tokens(window, cls_token)
    check_shape(name, "grad", grad, "H", num_tokens, num_tokens)
    check_float(name, grad=grad)
    dtype = grad.dtype if dtype is None else dtype
    check_float_dtype(name, dtype)
    resolved = SCATTER.resolve(impl, grad.device)
    return torch.ops.fused_beit.scatter_table(grad, window, cls_token, dtype, resolved.impl.value)


class SharedBias(NamedTuple):
    """A dense bias for all layers, expanded and rounded once: given whole to `rel_pos_attention` or `attention`.

    bias:    [H, N, N]  fp32 or float64: what gets the gradients, which autograd sums over the layers in this dtype
    rounded: [H, N, N]  the same in the dtype of the products, as the kernels read it; None where that is the bias's own
    """

    bias: Tensor
    rounded: Tensor | None


def _share(table: Tensor, dtype: torch.dtype | None, expand: Callable[[torch.dtype], Tensor]) -> SharedBias:
    dtype = table.dtype if dtype is None else dtype
    check_float_dtype("RelativePositionBias", dtype)
    wide = accumulate_dtype(torch.promote_types(table.dtype, dtype))
    bias = expand(wide)
    return SharedBias(bias, None if dtype == wide else align_rows(bias.detach(), dtype))


@fx_leaf
def _share_table(
    table: Tensor, dtype: torch.dtype | None, window: tuple[int, int], cls_token: bool, impl: str | Impl
) -> SharedBias:
    """RelativePositionBias.shared as one function of a table: what torch.fx records of it."""
    return _share(table, dtype, lambda wide: expand_table(table, window, cls_token, wide, impl))


class RelativePositionBias(nn.Module):
    """A learned table [R, H], zeros at first, expanded to a dense bias [H, N, N].

    window:    (Wh, Ww), sides of the window in patches
    num_heads: H
    cls_token: whether token 0 is a CLS token, with rows of its own
    impl:      of `expand_table` and `scatter_table`

    The blocks of BEiT's pre-training share one table: `shared` expands it once for all of them.
    """

    def __init__(
        self, window: tuple[int, int], num_heads: int, cls_token: bool = True, *, impl: str | Impl = AUTO
    ) -> None:
        super().__init__()
        sides = [*window, num_heads] if isinstance(window, Sequence) else []
        if len(sides) != 3 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise ValueError(
                f"RelativePositionBias: expected a window of two sides and num_heads, whole numbers of at least 1, but "
                f"got window={window}, num_heads={num_heads}"
            )
        EXPAND.resolve(impl, None)  # an unknown name is refused here, not in the first forward
        self.window = (window[0], window[1])
        self.num_heads = num_heads
        self.cls_token = cls_token
        self.impl = impl
        num_rows = num_relative_positions(self.window, cls_token)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_rows, num_heads))

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense bias [H, N, N] in `dtype`, the table's when None; its rows are aligned as `expand_table` says."""
        return expand_table(self.relative_position_bias_table, self.window, self.cls_token, dtype, self.impl)

    def shared(self, dtype: torch.dtype | None = None) -> SharedBias:
        """The dense bias for layers whose products are in `dtype`, the table's when None; one for every forward.

        Under autocast that is its dtype, torch.get_autocast_dtype(device_type). The table is expanded and rounded once.
        Each layer's gradient is that of the fp32 bias, so that the sum over the layers is made in fp32 and reduced to
        the table once.
        """
        table: Any = self.relative_position_bias_table
        if isinstance(table, torch.fx.Proxy):
            return _share_table(cast(Any, table), dtype, self.window, self.cls_token, self.impl)
        return _share(table, dtype, self)  # called as a module, so that hooks on it, as of ZeRO-3, bring the table

    def extra_repr(self) -> str:
        return f"window={self.window}, num_heads={self.num_heads}, cls_token={self.cls_token}"
