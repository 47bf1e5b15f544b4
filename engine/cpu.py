"""What training on a CPU asks of the C library and the system, and what the processor cannot do fast."""

import ctypes
import functools
from pathlib import Path

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


class RunQueue:
    """How long the threads of this process were ready to run and had no processor, as Linux counts it.

    Other processes, a container's limit, and more threads than processors make it long; threads that wait for each
    other or for a file do not. Data workers are processes of their own and not counted.

    Args:
        tasks: the folder with one folder for each thread.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task")) -> None:
        self._tasks = tasks
        self._before = self._read()

    def seconds(self) -> float:
        """Seconds since it was made, all living threads together; 0 where the system does not tell."""
        return sum(max(0, waited - self._before.get(thread, 0)) for thread, waited in self._read().items()) / 1e9

    def _read(self) -> dict[str, int]:
        """Nanoseconds of each thread: the second figure of its `schedstat`, after those that it ran."""
        found = {}
        for file in self._tasks.glob("*/schedstat"):
            try:
                found[file.parent.name] = int(file.read_text().split()[1])
            except (OSError, ValueError, IndexError):  # the thread has just ended, or the kernel does not count
                continue
        return found
