"""What a reader needs to judge a time by: the machine, the versions, the commit, and the machine's measured limits."""

import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .timers import device_timer, run_once

ROOT = Path(__file__).parent.parent
VERSIONS = ("torch", "triton", "transformers", "timm", "xformers", "deepspeed", "numpy", "pillow")


def processor() -> str:
    """The processor's model, as the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def folder_name(name: str) -> str:
    """A device's name as that of a folder: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


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


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""
    return output_of("git", "describe", "--always", "--dirty") or "unknown"


def sources() -> str:
    """A hash of all kernels, which names what was measured also where there is no git."""
    files = sorted((ROOT / "kernels").rglob("*.py"))
    parts = [f"{path.relative_to(ROOT)}\n{path.read_text()}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def facts(device: torch.device) -> dict[str, Any]:
    """The machine and the code that is measured on it."""
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
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in VERSIONS if (version := installed(name))},
        "commit": measured,
        "dirty": measured.endswith("-dirty") if measured != "unknown" else None,
        "sources": sources(),
    }


def limits(device: torch.device) -> dict[str, float]:
    """Measured: bytes/s of a large copy, FLOP/s of a large bf16 product (fp32 on a CPU), seconds of an empty run."""
    cuda = device.type == "cuda"
    side, size, rounds = (8192, 2**30, 20) if cuda else (256, 2**22, 5)
    timer = device_timer(device)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    factor = torch.randn(side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    product = torch.empty_like(factor)

    def seconds(run: Any) -> float:
        run_once(run)
        return median(timer(run) for _ in range(rounds))

    return {
        "bytes_per_s": 2 * size / seconds(lambda: target.copy_(source)),
        "flops_per_s": 2 * side**3 / seconds(lambda: torch.mm(factor, factor, out=product)),
        "empty_run_s": seconds(lambda: None),
    }
