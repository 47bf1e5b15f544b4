"""In which dtype an operator computes.

Outside autocast it is the dtype of the tensors. Under autocast it is autocast's dtype for what a matrix product follows
or makes; a residual stream keeps its own dtype. Softmax, LayerNorm and the loss sum in fp32 (float64 for float64).
"""

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F

KNOWN = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))


def has_autocast(device_type: str) -> bool:
    """Whether torch has autocast there; the meta device has none.

    Of the devices at hand torch was asked once: Dynamo of torch 2.11 cannot trace the question, and would divide every
    compiled block there.
    """
    return device_type in KNOWN or (device_type != "meta" and torch.amp.is_autocast_available(device_type))


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of a matrix product with `tensor`: autocast's where autocast is on, else its own. float64 is left alone."""
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or not has_autocast(device_type):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast off on this device; nothing where its type has no autocast."""
    if has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension with fp32 statistics; the result has the dtype of a product with `x`.

    Without a weight nothing is multiplied, without a bias nothing is added.
    """
    out_dtype = compute_dtype(x)
    if any(parameter is not None and parameter.dtype != x.dtype for parameter in (weight, bias)):
        # Mixed dtypes are not accepted on every device, and rounding the fp32 parameters would lose digits.
        wide = accumulate_dtype(x.dtype)
        x = x.to(wide)
        weight, bias = (None if parameter is None else parameter.to(wide) for parameter in (weight, bias))
    with without_autocast(x.device):
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps).to(out_dtype)
