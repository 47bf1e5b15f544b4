"""The learned relative position bias: a small table, its expansion to one bias per head, query and key.

H heads, N tokens, P patches, R rows of the table; (Wh, Ww) the window, in patches.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


def expand_table(table_RH: Tensor, window: tuple[int, int], cls_token: bool = True) -> Tensor:
    """The dense bias [H, N, N] of a table [R, H]: table[relative_position_index(window, cls_token)], head first.

    Made from sliding windows and not from the index: a patch's row of biases is a Wh x Ww window of the offsets. The
    gradient then sums windows in a fixed order, where that of an indexing would be free to use atomics on CUDA.
    """
    height, width = window
    table_HR = table_RH.t().contiguous()
    num_offsets = (2 * height - 1) * (2 * width - 1)
    offsets_HYX = table_HR[:, :num_offsets].unflatten(1, (2 * height - 1, 2 * width - 1))
    # The window of query (y, x) starts at (y, x) and holds the keys backwards, since an offset is query minus key.
    windows_HyxYX = offsets_HYX.unfold(1, height, 1).unfold(2, width, 1).flip(3, 4)
    bias_HPP = windows_HyxYX.reshape(-1, height * width, height * width)
    if not cls_token:
        return bias_HPP
    num_heads, num_patches, _ = bias_HPP.shape
    cls_to_patch, patch_to_cls, cls_to_cls = table_HR[:, num_offsets:, None, None].unbind(1)
    first_row = torch.cat([cls_to_cls, cls_to_patch.expand(num_heads, 1, num_patches)], dim=2)
    other_rows = torch.cat([patch_to_cls.expand(num_heads, num_patches, 1), bias_HPP], dim=2)
    return torch.cat([first_row, other_rows], dim=1)


class RelativePositionBias(nn.Module):
    """A learned table [R, H], zeros at first, expanded to a dense bias [H, N, N].

    window:    (Wh, Ww), sides of the window in patches
    num_heads: H
    cls_token: whether token 0 is a CLS token, with rows of its own

    Call it once for each set of weights: the blocks of BEiT's pre-training share one result, so that autograd sums
    their gradients in one [H, N, N] tensor and reduces it to the table once.
    """

    def __init__(self, window: tuple[int, int], num_heads: int, cls_token: bool = True) -> None:
        super().__init__()
        if len(window) != 2 or min(window) < 1 or num_heads < 1:
            raise ValueError(
                f"RelativePositionBias: expected a window of two sides and num_heads, all at least 1, but got "
                f"window={window}, num_heads={num_heads}"
            )
        self.window = (int(window[0]), int(window[1]))
        self.num_heads = num_heads
        self.cls_token = cls_token
        num_rows = num_relative_positions(self.window, cls_token)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_rows, num_heads))

    def forward(self) -> Tensor:
        """The dense bias [H, N, N], contiguous, in the dtype of the table."""
        return expand_table(self.relative_position_bias_table, self.window, self.cls_token)

    def extra_repr(self) -> str:
        return f"window={self.window}, num_heads={self.num_heads}, cls_token={self.cls_token}"
