"""The same pre-training on 1, 2, 4, ... GPUs: with the batch of the recipe, and with a batch that grows with them."""

from dataclasses import dataclass

from ..errors import UserError
from ..hardware import Gpu
from ..tokenizer.flops import TokenizerSize
from .choice import Way, choose, way
from .settings import PlanSettings

BOUND = 0.2
"""Share of a step spent waiting for the network from which it is said to bind."""


@dataclass(frozen=True)
class Row:
    """One number of GPUs; None where it cannot be run so."""

    gpus: int
    strong: Way | None
    """The global batch stays, so that each GPU has less to do: the same result, sooner."""
    weak: Way | None
    """The work of a GPU stays, so that the global batch grows: another recipe, for its learning rate must follow."""


def counts(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    powers = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return [*powers, largest]


def sweep(settings: PlanSettings, gpu: Gpu, tokenizer: TokenizerSize, chosen: Way) -> list[Row]:
    """How it scales to `settings.gpus`.

    Under weak scaling each GPU does in a step what it does in `chosen`, the way chosen for all GPUs.
    """
    rows = []
    for gpus in counts(settings.gpus):
        try:
            strong = choose(settings, gpu, tokenizer, gpus)
        except UserError:
            strong = None
        grown = settings.model_copy(
            update={
                "train": settings.train.model_copy(
                    update={"global_batch": gpus * chosen.micro_batch * chosen.accumulation}
                )
            }
        )
        weak = way(
            grown, gpu, tokenizer,
            gpus=gpus, stage=chosen.stage, offload=chosen.offload and settings.zero.config is None,
            recompute=chosen.recompute, micro_batch=chosen.micro_batch,
        )  # fmt: skip
        rows.append(Row(gpus, strong, weak if weak.fits(settings.hardware.reserve) else None))
    return rows


def efficiency(one: Way, model_rate: float) -> float:
    """Pictures a second and GPU, as a share of what a GPU does that waits for no other."""
    return one.pictures_per_s / one.gpus / model_rate


def alone(one: Way) -> float:
    """Pictures a second of a GPU that waits for no other."""
    return one.global_batch / one.gpus / (one.time.total - one.time.waits)


def binds(one: Way) -> bool:
    """Whether the network is what a step waits for."""
    return one.time.waits > BOUND * one.time.total
