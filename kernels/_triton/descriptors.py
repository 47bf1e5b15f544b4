"""What a kernel is handed for a tensor: a TMA descriptor made on the host, or the tensor itself with its strides."""

from typing import Any

import torch
from torch import Tensor

Strides = tuple[int, int, int]

ROW_ELEMENTS = 16
"""Triton loads whole vectors where strides are multiples of 16, whatever the size of an element."""


def tma_can_read(*tensors: Tensor) -> bool:
    """Whether descriptors can be made of all of them: last stride 1, all else in steps of 16 bytes."""
    for tensor in tensors:
        *others, last = tensor.stride()
        step = 16 // tensor.itemsize
        if last != 1 or tensor.data_ptr() % 16:
            return False
        for stride in others:
            if stride <= 0 or stride % step:
                return False
    return True


def padded_length(length: int) -> int:
    """Elements of a row of `length` in memory once it is aligned."""
    return -(-length // ROW_ELEMENTS) * ROW_ELEMENTS


def align_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` with each row padded to ROW_ELEMENTS: itself where it is so already, else a copy."""
    *lead, length = tensor.shape
    if tensor.dtype == dtype and tma_can_read(tensor) and tensor.stride(-2) % ROW_ELEMENTS == 0:
        # Even the last row's padding has to be memory of its own.
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = tensor.storage_offset() + last + 1 + padded_length(length) - length
        if end * tensor.itemsize <= tensor.untyped_storage().nbytes():
            return tensor
    copy = tensor.new_zeros(*lead, padded_length(length), dtype=dtype)[..., :length]
    return copy.copy_(tensor)


_templates: dict[tuple[Any, ...], Any] = {}
MOST_TEMPLATES = 4096


def source(tensor: Tensor, rows: int, cols: int, tma: bool) -> object:
    """What `load_tile` and `store_tile` take for tiles [rows, cols] of a tensor [I, J, R, C].

    A descriptor is checked once for each layout, for the checks take longer than many a kernel runs.
    """
    if not tma:
        return tensor
    key = (tensor.shape, tensor.stride(), tensor.dtype, rows, cols)
    template = _templates.get(key)
    if template is None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        template = TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, cols])
        template.base = None  # the tensor may go; its layout is what is kept
        if len(_templates) == MOST_TEMPLATES:
            _templates.clear()  # shapes that keep changing
        _templates[key] = template
    descriptor = object.__new__(type(template))
    descriptor.__dict__.update(template.__dict__, base=tensor)
    return descriptor


def strides(tensor: Tensor) -> Strides:
    """All strides of a tensor [I, J, R, C] but the last, which is 1."""
    return tensor.stride()[:3]  # type: ignore[return-value]
