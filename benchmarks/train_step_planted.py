"""Failures of the training step for rehearsals, which show with them that failures are found and survived."""

from collections.abc import Callable

from torch import Tensor

from . import providers
from .train_step import Case, Step
from .train_step_variations import no_deepspeed


class WrongStep(Step):
    """Finds a gradient that is off."""

    def outputs(self) -> dict[str, Tensor]:
        found = super().outputs()
        return found | {"gradient of head": providers.off(found["gradient of head"])}


def planted_wrong(case: Case) -> Step:
    return WrongStep(**vars(no_deepspeed(case)))


PLANTED: dict[str, Callable[[Case], Step]] = {
    "planted-wrong": planted_wrong,
    "planted-out-of-memory": providers.planted_out_of_memory,
    "planted-crash": providers.planted_crash,
}
