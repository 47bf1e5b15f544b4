"""Where a Triton kernel would run, and whether it can. Importing this imports no triton."""

import contextlib
import functools
import importlib.util
import re
from collections.abc import Iterator
from importlib import metadata

import torch

INTERPRETER = "interpreter"
OLDEST_NVIDIA = 80

pretended: str | None = None
"""The architecture of a GPU that is not there, while something is compiled or counted for it."""


@contextlib.contextmanager
def pretending(arch: str) -> Iterator[None]:
    """Within the block, operators on tensors without memory (meta or fake) are those of a GPU of this architecture."""
    global pretended
    before, pretended = pretended, arch
    try:
        yield
    finally:
        pretended = before


@functools.cache
def installed() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU: TRITON_INTERPRET=1 before anything asked."""
    import triton

    return triton.knobs.runtime.interpret


@functools.cache
def why_not_interpreted() -> str | None:
    """Why Triton's interpreter cannot run kernels beside the NumPy that is installed; None when it can.

    NumPy 2.4 no longer takes an array of one number for a number, as the interpreter did before Triton 3.7 with the
    bounds of a loop. Compiled kernels need no NumPy.
    """
    try:
        triton, numpy = metadata.version("triton"), metadata.version("numpy")
    except metadata.PackageNotFoundError as error:
        return f"Triton's interpreter needs {error.name}, which is not installed"
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton} fails beside NumPy {numpy}; it needs triton>=3.7 or numpy<2.4"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def why_unavailable(device: torch.device, *dtypes: torch.dtype | None) -> str | None:
    """Why no Triton kernel can run on tensors of this device and these dtypes; None when one can."""
    if pretended:
        return None
    if not installed():
        return "triton is not installed"
    if interpreted():
        if torch.bfloat16 in dtypes:
            return "Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there"
        return why_not_interpreted()
    if device.type != "cuda":
        return f"Triton needs a GPU and the tensors are on {device.type}; TRITON_INTERPRET=1 runs it slowly anywhere"
    # Without a GPU the tensors only have a shape.
    if torch.cuda.is_available() and _is_too_old(arch := arch_of(device)):
        return f"the kernels are made for GPUs from sm_80 on, and this one is {arch}"
    if torch.float64 in dtypes:
        return "the kernels are made for float32, float16 and bfloat16; float64 is for Triton's interpreter"
    return None


def why_not_compiled(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why no compiled kernel can run there; None when one can. Only who asks by name is given the slow interpreter."""
    if not pretended and installed() and interpreted():
        return "Triton's interpreter, which TRITON_INTERPRET=1 asks for, is slow"
    return why_unavailable(device, dtype)


def _is_too_old(arch: str) -> bool:
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) < OLDEST_NVIDIA


def arch_of(device: torch.device) -> str:
    """Architecture of a GPU, "sm_90" or "gfx942"; "interpreter" where that stands in for one."""
    if pretended or interpreted():
        return pretended or INTERPRETER
    return _arch_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _arch_of_gpu(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
