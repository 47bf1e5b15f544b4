"""Compiles launches for a GPU that is not there, and tells what the compiler made of them.

    with compiling_for("sm_90") as built:
        attention_fwd(...)                      # on meta tensors: compiled as on that GPU, and not run
    print([resources(kernel) for kernel in built])

This is the only place that reaches into Triton's internals. Works with Triton 3.6 to 3.9, not in the interpreter.
Triton keeps what it compiled on disk, by source, options and its own version; a second run takes it from there.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from . import target

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""KiB of shared memory that a program can have (CUDA C programming guide, table of compute capabilities; CDNA3 ISA)."""


TENSOR_MEMORY_LIMIT = 512


class Resources(NamedTuple):
    """What a compiled kernel takes. Instructions are counted in the code, not as often as they run."""

    kernel: str
    num_warps: int
    registers: int
    stack: int
    """Bytes a thread keeps in memory for want of registers."""
    shared: int
    """Bytes."""
    tensor_memory: int
    """Columns of it, of which sm_100 has TENSOR_MEMORY_LIMIT; 0 where there is none."""
    wgmma: int
    """Tensor core instructions that sm_90 has anew; those of tensor memory on sm_100."""
    mma: int
    """Tensor core instructions of before sm_90; MFMA on AMD."""
    tma: int
    spills: int
    """Loads and stores of the stack; on AMD the registers that are kept there."""
    atomics: int
    """Additions of floating-point numbers to global memory, in no fixed order."""
    programs_a_processor: int
    """How many fit a multiprocessor at once, by registers, warps, shared and tensor memory; 0: not estimated."""
    trapped: bool
    """Whether it does nothing but stop: what Triton makes of a kernel that it could not give its memory."""


class Case(NamedTuple):
    """A launch to compile."""

    arch: str
    shape: str
    """What is said of it in a table, like `build`."""
    build: str
    launch: Callable[[], None]
    """Launches on meta tensors; something that another process can import."""


def compile_case(case: Case) -> list[Resources]:
    """Of each kernel that a case launches, in order."""
    with compiling_for(case.arch) as built:
        case.launch()
    return [resources(kernel) for kernel in built]


class _PretendedDriver:
    """Stands for a GPU of one architecture while nothing is launched."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        if self.arch.startswith("sm_"):
            return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.arch, 64)


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[list[Any]]:
    """Within the block every launch is compiled for `arch` and not run. Yields the compiled kernels, as they come.

    Raises RuntimeError in the interpreter, which compiles nothing.
    """
    if target.interpreted():
        raise RuntimeError("compiling ahead of time needs TRITON_INTERPRET unset; it is set")
    built: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        built.append(kernel)
        return kernel

    JITFunction.run = compile_only
    active = driver._active
    driver.set_active(_PretendedDriver(arch))
    try:
        with target.pretending(arch):
            yield built
    finally:
        JITFunction.run = run
        driver._active = active


def resources(kernel: Any) -> Resources:
    """What a kernel compiled by `compiling_for` takes of its GPU."""
    read = _read_nvidia if "cubin" in kernel.asm else _read_amd
    return read(kernel)


def _read_nvidia(kernel: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, code = (_cuobjdump(what, cubin.name, kernel) for what in ("--dump-resource-usage", "-sass"))
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    registers, num_warps, shared = int(match[1]), kernel.metadata.num_warps, kernel.metadata.shared
    tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    return Resources(
        kernel=kernel.metadata.name,
        num_warps=num_warps,
        registers=registers,
        stack=int(match[2]),
        shared=shared,
        tensor_memory=tensor_memory,
        wgmma=_count(r"\bHGMMA|\bUTC\w*MMA", code),
        mma=_count(r"\bHMMA", code),
        tma=_count(r"\bUTMA(LDG|STG|REDG)", code),
        spills=_count(r"\b(LDL|STL)", code),
        atomics=_count(r"\b(RED|ATOM|ATOMG|REDG)\.\S*(F32|F64|F16|BF16)|\bUTMAREDG", code),
        programs_a_processor=_programs_a_processor(
            registers, num_warps, shared, tensor_memory, kernel.metadata.target.arch
        ),
        # Every kernel of ours stores something.
        trapped=not _count(r"\b(STG|UTMASTG|UTMAREDG|RED|REDG|ATOMG)\b", code),
    )


def _cuobjdump(what: str, cubin: str, kernel: Any) -> str:
    done = subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=False)
    if done.returncode:  # that of Triton 3.6 on sm_103
        raise RuntimeError(
            f"Triton {triton.__version__} compiled {kernel.metadata.name} for sm_{kernel.metadata.target.arch}, but "
            f"its cuobjdump cannot read the code: {' '.join(done.stderr.split())}; that of a later Triton may"
        )
    return done.stdout


def _read_amd(kernel: Any) -> Resources:
    code = kernel.asm["amdgcn"]
    registers, spilled, stack = (
        int(re.findall(rf"\.{what}:\s+(\d+)", code)[0])
        for what in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return Resources(
        kernel=kernel.metadata.name,
        num_warps=kernel.metadata.num_warps,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        tensor_memory=0,
        wgmma=0,
        mma=_count(r"\bv_mfma", code),
        tma=0,
        spills=spilled,
        atomics=_count(r"\b(global|buffer|flat)_atomic_(pk_)?add_f", code),
        programs_a_processor=0,
        trapped=not _count(r"\b(global|buffer|flat)_(store|atomic)", code),
    )


def _count(pattern: str, code: str) -> int:
    return sum(1 for _ in re.finditer(pattern, code))


def _programs_a_processor(registers: int, num_warps: int, shared: int, tensor_memory: int, arch: int) -> int:
    warps_limit = 48 if arch in (86, 89, 120) else 64
    kib = {80: 164, 86: 100, 89: 100, 120: 100}.get(arch, 228)
    # Registers are given to a warp in lots of 256; each program reserves 1 KiB of shared memory.
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * num_warps)
    by_tensor_memory = TENSOR_MEMORY_LIMIT // max(tensor_memory, 1)
    return min(by_registers, warps_limit // num_warps, kib * 1024 // (shared + 1024), by_tensor_memory, 32)
