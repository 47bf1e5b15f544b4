"""What `make bench-gpu` measures, part by part: in which order, for how long, and what the process of each does."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import machine, step_names
from .cases import Case
from .measuring import about, check_providers, first_line, is_a_slip, time_providers
from .operators import OPERATORS, SUBJECT_OF
from .providers import PLANTED, Provider
from .rounds import Row, summary
from .supervised import Event, Journal

NOT_REACHED = "not reached in the time given"
SECONDS = 5.0
"""What all providers of a part together are timed for in a direction, where that is five rounds or more."""

LIMITS = 10
"""Seconds for the limits of the machine, which are measured first."""
# In the order of their importance, with the seconds that each is given, most of them for compilers, Triton's too: first
# what the targets are about, and last what takes longest. An H100 with 16 cores took 80, 32, 41, 39, 33 and 181 s for
# the first, second, third, fourth, twelfth and last, the steps without their profiles; the others are estimated beside
# these. What is not here comes after it and has what it leaves.
PLAN: dict[tuple[str, ...], int] = {
    ("rel_pos_attention", "base"): 85,
    (step_names.SUBJECT, step_names.BASE, step_names.AS_THEY_ARE): 45,
    (step_names.SUBJECT, step_names.LARGE, step_names.AS_THEY_ARE): 55,
    ("residual_norm", "base"): 40,
    ("token_loss", "base"): 50,
    ("nearest_code", "dvae"): 35,
    ("nearest_code", "vqkd"): 20,
    ("embed_tokens", "base"): 25,
    ("gather_masked", "base"): 25,
    ("rel_pos_attention", "n577"): 60,
    ("rel_pos_attention", "n1025"): 60,
    (step_names.SUBJECT, step_names.BASE, step_names.VARIED): 60,
    (step_names.SUBJECT, step_names.BASE, step_names.COMPILED): 200,
}
MINUTES = (LIMITS + sum(PLAN.values())) / 60


@dataclass(frozen=True)
class Request:
    """What the process of a part is told."""

    names: tuple[str, ...]
    """Providers, planted failures among them."""
    broken: dict[str, str]
    """Provider -> why it is known to fail and is not tried again."""
    rounds: int
    """How often each is timed at most."""
    limits: dict[str, Any]
    until: float
    """time.monotonic() after which no more providers are begun."""
    rehearse: bool

    def why_stop(self) -> str:
        return NOT_REACHED if time.monotonic() > self.until else ""


@dataclass(frozen=True)
class Part:
    """What one process measures, which may crash without taking other parts with it."""

    key: tuple[str, ...]
    """In `PLAN`: operator and case; of the step, the group too."""
    subject: str
    """The file of its results."""
    title: str
    """What it is called while it is measured, with its sizes."""
    providers: tuple[str, ...]
    about: dict[str, dict[str, Any]]
    """Direction -> what the results say of it beside its rows, before anything is measured."""
    measure: Callable[[Request, Journal], None]
    """In a process of its own: into the journal, an event a direction."""

    @property
    def operator(self) -> str:
        return self.key[0]

    @property
    def case(self) -> str:
        return self.key[1]

    @property
    def label(self) -> str:
        operator, *rest = self.key
        return f"{operator} {', '.join(rest)}"

    @property
    def seconds(self) -> int:
        """What it is given of `MINUTES`; 0 for what the others leave."""
        return PLAN.get(self.key, 0)

    def without_times(self, names: Sequence[str], why: str) -> list[Event]:
        """The events of a part that was not measured."""
        rows = {name: {"absent": why} for name in names}
        return [{"direction": direction, "rows": rows, "seconds": []} for direction in self.about]


def operator_part(case: Case) -> Part:
    """A case of an operator in all its directions."""
    return Part(
        (case.operator, case.name),
        SUBJECT_OF[case.operator],
        str(case),
        tuple(OPERATORS[case.operator].providers),
        {direction: about(case, direction) | {"case": f"{case}, {direction}"} for direction in case.directions},
        partial(measure_operator, case),
    )


def step_part(name: str, group: str) -> Part:
    """A group of providers of the training step; the direction of its results is the group."""
    key = (step_names.SUBJECT, name, group)
    said = {"operator": step_names.SUBJECT, "name": name, "direction": group}
    label = f"{step_names.SUBJECT} {name}, {group}"
    return Part(
        key,
        step_names.SUBJECT,
        label,
        step_names.GROUPS[group],
        {group: said | {"case": label}},
        partial(measure_step, name, group),
    )


def every_part(*, rehearse: bool) -> list[Part]:
    """Everything that is measured, in the order of its importance."""
    found = [
        operator_part(case)
        for operator in OPERATORS.values()
        for case in (operator.rehearsal if rehearse else operator.on_gpu)
    ]
    found += [step_part(*key) for key in (step_names.REHEARSED if rehearse else step_names.ROUNDS)]
    order = list(PLAN)
    return sorted(found, key=lambda part: order.index(part.key) if part.key in order else len(order))


def time_is_up(parts: Sequence[Part], begun: float, seconds: float) -> list[float]:
    """When each part's share of `seconds` is used up, if all before it keep to theirs, from `begun` on.

    A part that ends early leaves its time to those after it.
    """
    total = LIMITS + sum(part.seconds for part in parts)
    ends, given = [], LIMITS
    for part in parts:
        given += part.seconds
        ends.append(begun + seconds * given / total)
    return ends


def result(direction: str, rows: Sequence[Row], **more: Any) -> Event:
    """The event of a direction that was measured."""
    first = next((row for row in rows if row.seconds), None)
    by_provider = {row.provider: summary(row) for row in rows}
    return {"direction": direction, "rows": by_provider, "seconds": first.seconds if first else [], **more}


def this_device(rehearse: bool) -> torch.device:
    if rehearse:
        torch.set_num_threads(1)
    return torch.device("cpu" if rehearse else "cuda")


def measure_machine(rehearse: bool, journal: Journal) -> None:
    """In a process of its own: what the machine is and can do."""
    device = this_device(rehearse)
    journal.add(machine=machine.facts(device), limits=machine.limits(device, small=rehearse))


def measure_operator(case: Case, request: Request, journal: Journal) -> None:
    every: dict[str, Provider] = {**OPERATORS[case.operator].providers, **PLANTED}
    checked = check_providers(
        case,
        {name: every[name] for name in request.names},
        this_device(request.rehearse),
        told=lambda name: journal.add(doing=name),
        broken=request.broken,
        why_stop=request.why_stop,
    )
    for direction in case.directions:
        journal.add(doing=direction)
        rows = time_providers(checked, direction, rounds=request.rounds, seconds=SECONDS, limits=request.limits)
        journal.add(**result(direction, rows))


def measure_step(name: str, group: str, request: Request, journal: Journal) -> None:
    """Where the engine cannot be imported, into the journal the reason."""
    this_device(request.rehearse)
    journal.add(doing="importing the engine")
    try:
        from . import train_step_cases, train_step_planted, train_step_timing
    except Exception as error:
        if is_a_slip(error):
            raise
        journal.add(absent=f"the engine cannot be imported: {first_line(error)}")
        return
    rounds = train_step_cases.rehearsal() if request.rehearse else train_step_cases.on_gpu()
    one = next(one for one in rounds if (one.name, one.group) == (name, group))
    every = train_step_cases.PROVIDERS | train_step_planted.PLANTED
    journal.add(doing="its references")
    found = train_step_timing.check_steps(
        one.case,
        {name: every[name] for name in request.names},
        told=lambda name: journal.add(doing=name),
        broken=request.broken,
        why_stop=request.why_stop,
    )
    journal.add(doing="timing")
    rows = train_step_timing.time_steps(
        found, label=one.label, rounds=request.rounds, limits=request.limits, seconds=SECONDS
    )
    journal.add(**result(group, rows, about=one.about() | {"case": one.label}))
