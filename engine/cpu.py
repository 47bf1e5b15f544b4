"""What training on a CPU asks of the C library and the system, and what the processor can and cannot do fast."""

import ctypes
import functools
import os
import platform
import tempfile
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


def keep_compiled_code_apart() -> None:
    """Where ATEN_CPU_CAPABILITY imitates a lesser processor, give torch.compile a cache of its own.

    Its cache does not tell kernels apart by the instructions that they were compiled to. Those of the other kind gave
    NaN, indices out of bounds or an abort (torch 2.13 and 2.14.1).
    """
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    if capability:
        folder = Path(tempfile.gettempdir()) / f"torchinductor-{capability}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


INSTRUCTION_SETS = ("less than AVX2", "AVX2", "AVX-512", "AVX-512 with bf16", "AVX-512 with bf16 and AMX")
"""Kinds of x86 processors that differ in how fast they train, each with all that those before it have."""
_OLDER, _AVX2, _AVX512, _BF16, _AMX = range(len(INSTRUCTION_SETS))
_FLAGS = {
    _AMX: {"amx_bf16", "avx512_bf16"},
    _BF16: {"avx512_bf16"},
    _AVX512: {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    _AVX2: {"avx2", "fma"},
}
"""What Linux calls it in /proc/cpuinfo."""
_ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_ONEDNN_LIMITS = {
    **dict.fromkeys(("SSE41", "AVX"), _OLDER),
    **dict.fromkeys(("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), _AVX2),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), _AVX512),
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"), _BF16),
}
"""Values that limit oneDNN, by its developer guide, "CPU dispatcher control"; others do not."""
_ATEN_LIMITS = {"AVX512": _AMX, "AVX2": _AVX2}
"""What torch's own loops use; they know no more than AVX-512."""


def has_bf16() -> bool:
    """Whether torch has fast products of bf16 for this processor; where it has not, bf16 is far slower than fp32.

    oneDNN makes these products, and says that it can on AVX-512 without bf16 too; there it imitates them.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return not _is_x86() or min(_native(), _onednn_limit()) != _AVX512


def instruction_set() -> str:
    """The processor's kind as torch and oneDNN use it here, one of `INSTRUCTION_SETS`; on Arm, "aarch64".

    Variables limit both, each one its own. Where they differ, both are named.
    """
    if not _is_x86():
        return platform.machine() or "unknown"
    products = min(_native(), _onednn_limit())
    loops = min(_native(), _ATEN_LIMITS.get(torch.backends.cpu.get_cpu_capability(), _OLDER))
    if min(products, _AVX512) == min(loops, _AVX512):
        return INSTRUCTION_SETS[products]
    return f"{INSTRUCTION_SETS[min(loops, _AVX512)]}, in oneDNN {INSTRUCTION_SETS[products]}"


def imitation() -> str:
    """By which variables, and how far, a lesser processor is imitated; "" where this one is used as it is.

    MKL, which makes products in fp32, heeds neither oneDNN's variable nor torch's, but one of its own.
    """
    by_mkl = "MKL_ENABLE_INSTRUCTIONS" in os.environ
    if not _is_x86() or (instruction_set() == INSTRUCTION_SETS[_native()] and not by_mkl):
        return ""
    variables = (*_ONEDNN_VARIABLES, "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
    given = " ".join(f"{name}={os.environ[name]}" for name in variables if name in os.environ)
    beyond = torch.backends.mkl.is_available() and not by_mkl
    exception = ", but for products in fp32, which MKL makes" if beyond else ""
    return f"imitated by {given} on a processor with {INSTRUCTION_SETS[_native()]}{exception}"


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


@functools.cache
def _native() -> int:
    """What the processor has, a place in `INSTRUCTION_SETS`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return next((kind for kind, needed in _FLAGS.items() if needed <= flags), _OLDER)


def _onednn_limit() -> int:
    given = next((os.environ[name] for name in _ONEDNN_VARIABLES if name in os.environ), "")
    return _ONEDNN_LIMITS.get(given.upper(), _AMX)


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
