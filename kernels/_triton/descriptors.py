"""What a kernel is handed for a tensor: a TMA descriptor made on the host, or the tensor itself with its strides."""

import torch
from torch import Tensor

Strides = tuple[int, int, int]


def tma_can_read(*tensors: Tensor | None) -> bool:
    """Whether descriptors can be made of all of them: last stride 1, all else in steps of 16 bytes."""
    return all(
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
        if tensor is not None
    )


def align_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` with each row on a multiple of 16 bytes: itself where it is so already, else a copy."""
    if tensor.dtype == dtype and tma_can_read(tensor):
        return tensor
    step = 16 // dtype.itemsize
    *lead, length = tensor.shape
    copy = tensor.new_empty(*lead, -(-length // step) * step, dtype=dtype)[..., :length]
    return copy.copy_(tensor)


def source(tensor: Tensor, rows: int, cols: int, tma: bool) -> object:
    """What `load_tile` and `store_tile` take for tiles [rows, cols] of a tensor [I, J, R, C]."""
    if not tma:
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, cols])


def strides(tensor: Tensor) -> Strides:
    """All strides of a tensor [I, J, R, C] but the last, which is 1."""
    i, j, row, _ = tensor.stride()
    return i, j, row
