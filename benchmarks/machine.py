"""What a reader needs to judge a time by: the machine, the versions, the commit, and the machine's measured limits."""

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fused_beit.engine.cpu import has_bf16, imitation, instruction_set  # which needs torch alone

from .timers import device_timer, run_once

ROOT = Path(__file__).parent.parent
VERSIONS = (
    "torch",
    "triton",
    "transformers",
    "timm",
    "xformers",
    "deepspeed",
    "numpy",
    "pillow",
    "liger-kernel",
    "nvidia-cudnn-frontend",
)


def processor() -> str:
    """The processor's model, as the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def kind(facts: Mapping[str, Any]) -> str:
    """Of a processor, the instruction set that was used: as "AVX2" or "AVX2, imitated"; of a GPU ""."""
    if facts["gpu"]:
        return ""
    used = facts.get("instruction_set") or "instruction set not recorded"
    return f"{used}, imitated" if facts.get("imitated") else used


def folder_name(facts: Mapping[str, Any]) -> str:
    """A machine's name as that of a folder: "nvidia-h200", "amd-epyc-avx2", "amd-epyc-avx2-imitated"."""
    name = f"{facts['device']} {kind(facts)}".lower().replace("(r)", "").replace("(tm)", "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str:
    """What a command prints; empty where there is no such command or it fails."""
    try:
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return shown.stdout.strip() if shown.returncode == 0 else ""


# What a result depends on. Results, pages and plots made from them may differ from the commit without harm.
MEASURED = ("kernels", "engine", "ds_configs", "benchmarks/*.py", "setup.py", "pyproject.toml")


def commit() -> str:
    """The commit that is measured, marked where files that are measured differ from it."""
    name = output_of("git", "rev-parse", "--short=12", "HEAD")
    if not name:
        return "unknown"
    changed = output_of("git", "status", "--porcelain", "--", *MEASURED)
    return f"{name}-dirty" if changed else name


def sources() -> str:
    """A hash of all kernels, which names what was measured also where there is no git."""
    files = sorted((ROOT / "kernels").rglob("*.py"))
    parts = [f"{path.relative_to(ROOT)}\n{path.read_text()}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def facts(device: torch.device) -> dict[str, Any]:
    """The machine and the code that is measured on it; `load` is the number of threads that wanted to run at once."""
    cuda = device.type == "cuda"
    measured = commit()
    capability = torch.cuda.get_device_capability(device) if cuda else ()
    return {
        "device": device_name(device),
        "gpu": device_name(device) if cuda else None,
        "capability": ".".join(map(str, capability)) or None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "processor": processor(),
        "instruction_set": instruction_set(),
        "imitated": imitation(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version for name in VERSIONS if (version := installed(name))},
        "commit": measured,
        "dirty": measured.endswith("-dirty") if measured != "unknown" else None,
        "sources": sources(),
    }


def limits(device: torch.device, *, small: bool = False) -> dict[str, Any]:
    """Measured: what the machine can do at best.

    bytes_per_s:    of a copy that no cache holds, reads and writes counted
    flops_per_s:    of a large product in bf16, on a CPU in fp32
    flops_per_s_in: the same by dtype, in fp32 and bf16; not in bf16 on a CPU that imitates it, which may take minutes
    empty_run_s:    what the timer gives for nothing
    small:          smaller products and copies, for a rehearsal
    """
    cuda = device.type == "cuda"
    side, size, rounds = (8192, 2**30, 20) if cuda else (256, 2**22, 5) if small else (1024, 2**28, 7)
    dtypes = (torch.bfloat16, torch.float32) if cuda else (torch.float32, torch.bfloat16)[: 1 + has_bf16()]
    timer = device_timer(device)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def seconds(run: Any) -> float:
        run_once(run)
        return median(timer(run) for _ in range(rounds))

    def product_rate(dtype: torch.dtype) -> float:
        factor = torch.randn(side, side, device=device, dtype=dtype)
        product = torch.empty_like(factor)
        return 2 * side**3 / seconds(lambda: torch.mm(factor, factor, out=product))

    rates = {str(dtype).removeprefix("torch."): product_rate(dtype) for dtype in dtypes}
    return {
        "bytes_per_s": 2 * size / seconds(lambda: target.copy_(source)),
        "flops_per_s": next(iter(rates.values())),
        "flops_per_s_in": rates,
        "empty_run_s": seconds(lambda: None),
    }
