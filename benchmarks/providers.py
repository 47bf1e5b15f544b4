"""Who does an operator's work: ours, other settings of ours, what people would use instead, and bounds.

A bound is faster work that is not the same: attention without the bias, a loss's products alone.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_beit.kernels import resolve

from .cases import Case, Function, Inputs, Work, as_tuple, work_by
from .rounds import AbsentError

OURS, CANDIDATE, PEER, BOUND = "ours", "candidate", "peer", "bound"


class Provider(NamedTuple):
    """How it is called in tables, what it is, and how it is made for a case."""

    kind: str
    about: str
    make: Callable[[Any], Work]
    """Of the case's inputs. Raises AbsentError or ImplUnavailable where it cannot run."""
    variant: str = ""
    """The specification of other work, to which a bound is held."""
    inexact: str = ""
    """Why its results may break the rule, where that is known; where they do, it is absent with this reason."""


@dataclass(frozen=True)
class Operator:
    """An operator with all that it is timed on and against. The first provider is what others are compared with."""

    name: str
    providers: dict[str, Provider]
    on_gpu: tuple[Case, ...]
    """In the order of their importance: a run that is short of time does the first ones."""
    on_cpu: tuple[Case, ...]
    smoke: tuple[Case, ...]
    rehearsal: tuple[Case, ...]
    written_out: str
    """The provider that is the work as people write it in eager torch, which ours must not fall behind on a CPU."""

    @property
    def directions(self) -> tuple[str, ...]:
        return self.on_gpu[0].directions


def by_impl(inputs: Inputs, impl: str) -> Work:
    """The public operator by one of its implementations."""
    case = inputs.case
    if impl == "triton":
        refuse_the_interpreter(case, inputs.device)
    return work_by(inputs, case.call(impl), plan=what_runs(case, impl, inputs.device))


def what_runs(case: Case, impl: str, device: torch.device) -> str:
    """What `auto` became and why, "" for what was asked for by name. Raises ImplUnavailable where it cannot run."""
    resolved = resolve(case.operator, impl, device)
    return f"{resolved.impl.value}: {resolved.reason}" if impl == "auto" else ""


class Rehearsable(Protocol):
    """A case of an operator or of the training step."""

    @property
    def rehearsal(self) -> bool: ...


def refuse_the_interpreter(case: Rehearsable, device: torch.device) -> None:
    if device.type == "cpu" and not case.rehearsal:
        raise AbsentError("on a CPU Triton runs only in its interpreter, whose times say nothing")


def compiled(inputs: Inputs) -> Work:
    """The reference by torch.compile."""
    return work_by(inputs, compile_for(inputs.device, inputs.case.call("reference")))


def compile_for(device: torch.device, function: Function) -> Function:
    if device.type == "cpu":
        raise AbsentError("compiled for GPUs only")
    return torch.compile(function, dynamic=False)


def written(function: Function) -> Callable[[Inputs], Work]:
    """A provider's `make` of a function of the case's tensors."""
    return partial(work_by, function=function)


OURS_FIRST = {
    "triton": Provider(OURS, "the Triton kernels", partial(by_impl, impl="triton")),
    "auto": Provider(OURS, "what runs where nothing is asked for", partial(by_impl, impl="auto")),
}
REFERENCE = {"reference": Provider(PEER, "eager torch, the specification", partial(by_impl, impl="reference"))}
# What compiles for long comes last.
COMPILED = {"compiled": Provider(PEER, "the same by torch.compile", compiled)}


def planted_wrong(inputs: Any) -> Work:
    work = inputs.case.plain(inputs)
    return replace(work, call=lambda: tuple(off(output) for output in as_tuple(work.call())))


def off(output: Tensor) -> Tensor:
    return output * 1.1 if output.is_floating_point() else output


def planted_out_of_memory(inputs: Any) -> Work:
    raise torch.OutOfMemoryError("planted: tried to allocate what there is not")


def planted_crash(inputs: Any) -> Work:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


PLANTED = {
    "planted-wrong": Provider(OURS, "a wrong result, which must be noticed", planted_wrong),
    "planted-out-of-memory": Provider(PEER, "no memory, which must be recorded", planted_out_of_memory),
    "planted-crash": Provider(PEER, "the end of its process, which others must survive", planted_crash),
}
"""For rehearsals, which show with them that failures are found and survived."""
