"""A training step measured: every provider of a round built and checked, then timed in turn."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_beit.kernels import ImplUnavailable

from .measuring import Told, first_line
from .rounds import AbsentError, Drive, Row, every_round, give_back, quartiles, time_in_turn, time_once
from .spread import add_spread
from .step_names import PEERS
from .timers import host_and_device, memory, wall_seconds
from .train_step import DEVICE, Case, References, Step

Make = Callable[[Case], Step]


@dataclass
class Checked:
    """The providers of a case whose first step is right, and why the others are not among them."""

    case: Case
    steps: dict[str, Step] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    state_bytes: dict[str, int] = field(default_factory=dict)
    """On a GPU: what a provider keeps there between two steps, its weights and the optimizer's memory."""


def check_steps(
    case: Case,
    providers: Mapping[str, Make],
    *,
    told: Told = lambda provider: None,
    broken: Mapping[str, str] | None = None,
    why_stop: Callable[[], str] = lambda: "",
) -> Checked:
    """Build every provider and hold its first step to `References`; `told`, `broken` and `why_stop` as in `measuring`.

    A provider is absent where it says so itself or has no memory. Whatever else it raises has failed, of a peer too;
    the others are tried and timed all the same.
    """
    found = Checked(case)
    if "torch._dynamo" in sys.modules:  # which takes seconds to load, and has compiled nothing where it is not
        torch.compiler.reset()  # of other cases; not of providers, or those before would be compiled again
    try:
        case.make_inputs()
        references = References(case)
    except torch.OutOfMemoryError as error:
        found.absent = dict.fromkeys(providers, f"out of memory, already for its references: {first_line(error)}")
        return found
    give_back()
    for name, make in providers.items():
        if why := (broken or {}).get(name, ""):
            found.failed[name] = why
        elif why := why_stop():
            found.absent[name] = why
        else:
            told(name)
            before = allocated()
            try_step(found, name, make, references)
            give_back()
            if name in found.steps and DEVICE.type == "cuda":
                found.state_bytes[name] = allocated() - before
    return found


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def try_step(found: Checked, name: str, make: Make, references: References) -> None:
    """Add the provider's step to `found`, or the reason why there is none."""
    try:
        step = make(found.case)
        found.errors[name] = references.check(name, step.outputs(), peer=name in PEERS)
        found.steps[name] = step
    except (AbsentError, ImplUnavailable) as error:
        found.absent[name] = first_line(error)
    except torch.OutOfMemoryError as error:
        found.absent[name] = f"out of memory: {first_line(error)}"
    except AssertionError as error:
        found.failed[name] = f"wrong result: {first_line(error)}"
    except Exception as error:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()  # raises where the error has broken the device for all that would follow
        found.failed[name] = f"refused: {type(error).__name__}: {first_line(error)}"


def time_steps(
    found: Checked,
    *,
    label: str,
    rounds: int,
    limits: Mapping[str, Any],
    seconds: float | None = None,
    drive: Drive = every_round,
) -> list[Row]:
    """A row a provider, with its pictures/s, FLOP/s and, on a GPU, its memory and what host and device each take.

    rounds:  how often each is timed, where that takes no longer than
    seconds: in all, where this is given; but five rounds, or `rounds` where that is less, in any case
    """
    case, absent = found.case, dict(found.absent)
    peaks: dict[str, dict[str, int]] = {}
    for name, step in found.steps.items():
        try:
            peaks[name] = memory(step, DEVICE) if DEVICE.type == "cuda" else {}
        except torch.OutOfMemoryError as error:
            absent[name] = f"out of memory: {first_line(error)}"
        if name in absent:  # not before: until then the error holds what the step had made
            give_back()
    steps = {name: found.steps[name] for name in peaks}
    if seconds is not None:
        once, lacking = time_once(steps, wall_seconds)
        absent |= lacking
        steps = {name: steps[name] for name in once}
        rounds = min(rounds, max(5, int(seconds / sum(once.values())))) if once else rounds
    rows = [Row(label, name, absent=why) for name, why in absent.items()]
    if steps:
        rows = time_in_turn(label, steps, rounds=rounds, drive=drive, absent=absent, errors=found.errors)
    add_spread(rows)
    for row in rows:
        if row.seconds:
            row.facts |= apart(steps[row.provider])
            row.facts |= peaks[row.provider] | rates(case, quartiles(row.seconds)[1], limits)
            if row.provider in found.state_bytes:
                row.facts["state_bytes"] = found.state_bytes[row.provider]
            row.facts["about"] = steps[row.provider].about
            row.facts |= {"note": case.note} if case.note else {}
    return [*rows, *(Row(label, name, failed=why) for name, why in found.failed.items())]


def apart(step: Step) -> dict[str, Any]:
    """What host and device each take, or why that is not known: a profile that fails takes no time away."""
    try:
        return host_and_device(step, DEVICE)
    except Exception as error:
        return {"not_profiled": f"{type(error).__name__}: {first_line(error)}"}


def rates(case: Case, seconds: float, limits: Mapping[str, Any]) -> dict[str, float]:
    """Pictures/s, GFLOP/s, and MFU where the matrix rate was measured in this precision."""
    flops_per_s = case.shape.flops / seconds
    found = {"pictures_per_s": case.shape.batch / seconds, "gflop_per_s": flops_per_s / 1e9}
    rate = limits["flops_per_s_in"].get(str(case.dtype).removeprefix("torch."))
    return found | ({"mfu": flops_per_s / rate} if rate else {})
