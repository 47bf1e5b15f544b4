"""What training on a CPU asks of the C library, and what the processor cannot do fast."""

import ctypes
import functools

import torch

# Of <malloc.h>, glibc's.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST = 2**31 - 1
_TOP_PAD = 64 << 20  # bytes asked of the system at once


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensors; returns whether it can (glibc's can).

    By default it gives large blocks back at once, so every activation of every step is new memory, which the system
    fills with zeros page by page. The next step needs the same memory, so the peak hardly rises; values do not change.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, _TOP_PAD))
    return all(mallopt(option, value) == 1 for option, value in options)


def has_bf16() -> bool:
    """Whether torch has fast products of bf16 for this processor; where it has not, bf16 is far slower than fp32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
