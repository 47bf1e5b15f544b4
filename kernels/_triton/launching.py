"""What every launch asks of the device: to be the current one, and how exactly to multiply."""

import contextlib
from typing import Any

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which is not always that of the tensors."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def product_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: fp32 is exact unless torch was told, in any of its ways, that it need not be."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
