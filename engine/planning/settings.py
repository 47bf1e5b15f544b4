"""Settings of a plan: those of the pre-training it is for, and what is known of the machine. Imports no torch."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from ..config import Section, Settings, check_combinations, check_paths
from ..errors import UserError
from ..hardware import GPUS, Gpu

ASSUMED_RESERVE = 0.1
"""Share of the memory left to the driver, the libraries' workspaces and fragmentation. Not measured."""
DISPATCH_US = 17.0
"""Microseconds that the host takes to start one of torch's operators from Python.

Measured on one core of an AMD EPYC, with tiny tensors on the CPU: 21 ms for the 1,249 of a step of BEiT-base.
"""
PICTURES = {"in1k": 1_281_167, "in22k": 14_197_122}
"""Training pictures of the data sets that presets are named after: ILSVRC 2012 (arXiv:1409.0575, table 2), and all of
ImageNet as of its fall 2011 release."""


class HardwareSettings(Section):
    """What a GPU and its machine can do, in place of the published figures of `gpu`."""

    memory_gb: float | None = Field(None, gt=0)
    """Memory of a GPU, in GB of 10^9 bytes."""
    bf16_tflops: float | None = Field(None, gt=0)
    """Dense matrix products in bf16, in TFLOP/s."""
    tf32_tflops: float | None = Field(None, gt=0)
    """Convolutions in fp32 as torch runs them."""
    fp32_tflops: float | None = Field(None, gt=0)
    """Matrix products in fp32 as torch runs them."""
    bandwidth_gb_s: float | None = Field(None, gt=0)
    """Of a GPU's memory, in GB/s."""
    node_link_gb_s: float | None = Field(None, gt=0)
    """Of a GPU to the others of its machine, one direction."""
    network_gb_s: float | None = Field(None, gt=0)
    """Of a GPU to other machines, one direction."""
    host_link_gb_s: float | None = Field(None, gt=0)
    """Of a GPU to the memory of its machine, one direction."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs of a machine."""
    watts: float | None = Field(None, gt=0)
    """Power of a GPU under load."""
    reserve: float = Field(ASSUMED_RESERVE, ge=0, lt=1)
    """Share of a GPU's memory that tensors are not to take."""


class PlanSettings(Settings):
    """A pre-training, and the machine that it is planned for."""

    SPEED_ONLY: ClassVar[frozenset[str]] = Settings.SPEED_ONLY | {
        "gpus", "gpu", "pictures", "mfu", "dispatch_us", "price_per_gpu_hour", "sweep"
    }  # fmt: skip

    gpus: int = Field(1, ge=1)
    """GPUs, each with one rank."""
    gpu: str = "h200"
    """Kind of GPU: h200, h100, b200, a100_80, a100_40, l40s, rtx4090, or custom, which takes all of `hardware`."""
    pictures: int | None = Field(None, ge=1)
    """Pictures to train on; none: those of `data.path`, of the data set the preset is named after, or the digits."""
    mfu: float | None = Field(None, gt=0, le=1)
    """Share of the published rate that the products of model and tokenizer reach, all else included; none: predicted by
    implementation."""
    dispatch_us: float = Field(DISPATCH_US, ge=0)
    """Microseconds that the host takes to start one operator of torch, which binds small models and batches."""
    price_per_gpu_hour: float | None = Field(None, ge=0)
    """Price of a GPU for an hour, in any currency."""
    sweep: Path | None = None
    """An SVG file to draw how it scales from 1 to `gpus` GPUs; prints the table too."""
    hardware: HardwareSettings = HardwareSettings()


def check(settings: Settings) -> None:
    """Raise `UserError` for what cannot be planned. Unlike a run, a plan needs no pictures."""
    assert isinstance(settings, PlanSettings)
    check_combinations(settings)
    check_paths(settings)
    resolve_gpu(settings)
    if settings.sweep is not None and settings.sweep.suffix != ".svg":
        raise UserError(f"sweep = {settings.sweep} is to be a picture; give a name that ends in .svg.")


def resolve_gpu(settings: PlanSettings) -> Gpu:
    """The GPU that is planned for, with what `hardware` replaces.

    Raises:
        UserError: for a kind that is not known, or a custom one that is not described in full.
    """
    given = settings.hardware.model_dump(exclude={"reserve"}, exclude_none=True)
    if settings.gpu in GPUS:
        return Gpu(**(vars(GPUS[settings.gpu]) | given))
    if settings.gpu != "custom":
        raise UserError(
            f"gpu = {settings.gpu!r} is not known; known are {', '.join(GPUS)}, and custom, described by --hardware.*."
        )
    missing = [name for name in HardwareSettings.model_fields if name != "reserve" and name not in given]
    if missing:
        options = ", ".join(f"--hardware.{name}" for name in missing)
        raise UserError(f"gpu = custom needs all of its description; give {options} too.")
    return Gpu(key="custom", name="custom GPU", **given)


def published_pictures(preset: str) -> tuple[int, str] | None:
    """Pictures of the data set that a preset is named after, and its name."""
    for name, count in PICTURES.items():
        if name in preset.split("_"):
            return count, {"in1k": "ImageNet-1k", "in22k": "ImageNet-22k"}[name]
    return None
