"""An operator measured: every provider of a case built and checked, then timed in each direction."""

import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_beit.kernels import ImplUnavailable

from .cases import Case, Work
from .providers import BOUND, PEER, Provider
from .rounds import AbsentError, Drive, Outputs, Row, every_round, quartiles, time_in_turn, time_once
from .timers import EventTimer, Run, device_timer, memory, timed_by

Told = Callable[[str], None]


@dataclass
class Checked:
    """The providers of a case whose results are right, and why the others are not among them."""

    case: Case
    device: torch.device
    providers: Mapping[str, Provider]
    works: dict[str, Work] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    pictures: int | None = None
    """How many the results were checked on, where that is not as many as there are."""


def check_providers(
    case: Case,
    providers: Mapping[str, Provider],
    device: torch.device,
    *,
    told: Told = lambda provider: None,
    broken: Mapping[str, str] | None = None,
    why_stop: Callable[[], str] = lambda: "",
) -> Checked:
    """Build every provider and hold its results to the house's rule.

    told:     is given the name of each provider before it is tried
    broken:   provider -> why it is known to fail and is not tried again
    why_stop: why no more providers are tried, such as a lack of time; empty while there is no reason
    """
    checked = Checked(case, device, providers)
    try:
        inputs = case.inputs(device)
        references = case.references(inputs)
    except torch.OutOfMemoryError as error:
        why = f"out of memory, already for inputs and reference: {first_line(error)}"
        checked.absent = dict.fromkeys(providers, why)
        return checked
    checked.pictures = references.pictures
    for name, provider in providers.items():
        if why := (broken or {}).get(name, ""):
            checked.failed[name] = why
        elif why := why_stop():
            checked.absent[name] = why
        else:
            told(name)
            try_provider(checked, name, provider, inputs, references)
            collect(device)
    return checked


def try_provider(checked: Checked, name: str, provider: Provider, inputs: Any, references: Any) -> None:
    """Add the provider's work to `checked`, or the reason why there is none."""
    found: Outputs | None = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # torch says in warnings why it has no kernel
        try:
            work = provider.make(references.inputs)
            found = work.results()
            if references.inputs is not inputs:
                work = provider.make(inputs)
        except (AbsentError, ImplUnavailable) as error:
            checked.absent[name] = first_line(error)
        except torch.OutOfMemoryError as error:
            checked.absent[name] = f"out of memory: {first_line(error)}"
        except Exception as error:
            if checked.device.type == "cuda":
                torch.cuda.synchronize()  # raises where the error has broken the device for all that would follow
            why = "; ".join([f"{type(error).__name__}: {first_line(error)}", *(first_line(w.message) for w in said)])
            reasons = checked.absent if provider.kind in (PEER, BOUND) and not is_a_slip(error) else checked.failed
            reasons[name] = f"refused: {why}"[:600]
    if found is None:
        return
    try:
        checked.errors[name] = references.check(name, found, provider.variant)
        checked.works[name] = work
    except torch.OutOfMemoryError as error:
        checked.absent[name] = f"out of memory, for its reference: {first_line(error)}"
    except AssertionError as error:
        if provider.inexact:
            checked.absent[name] = f"not exact: {provider.inexact}; {first_line(error)}"
        else:
            checked.failed[name] = f"wrong result: {first_line(error)}"


def is_a_slip(error: Exception) -> bool:
    """Whether it says that code calls something wrongly, which a peer that cannot do a case does not say."""
    return isinstance(error, (TypeError, AttributeError, NameError))


def time_providers(
    checked: Checked,
    direction: str,
    *,
    rounds: int,
    limits: Mapping[str, Any],
    seconds: float = 60.0,
    drive: Drive = every_round,
) -> list[Row]:
    """Rows of all providers in one direction.

    rounds:  how often each is timed, where that takes no longer than
    seconds: in all; but five rounds, or `rounds` where that is less, in any case
    limits:  of the machine, as `machine.limits` measures them
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were heard when the provider was tried
        return _time_providers(checked, direction, rounds, limits, seconds, drive)


def _time_providers(
    checked: Checked, direction: str, rounds: int, limits: Mapping[str, Any], seconds: float, drive: Drive
) -> list[Row]:
    case, device = checked.case, checked.device
    runs: dict[str, Run] = {}
    absent, found = dict(checked.absent), {}
    for name, work in checked.works.items():
        run = work.run(direction)
        try:
            found[name] = memory(run, device)
            runs[name] = run
        except torch.OutOfMemoryError as error:
            absent[name] = f"out of memory: {first_line(error)}"
        collect(device)
    label = f"{case}, {direction}"
    timer = device_timer(device, runs.values())
    once, lacking = time_once(runs, timer)
    absent |= lacking
    runs = {name: runs[name] for name in once}
    timed = []
    if runs:
        rounds = min(rounds, max(5, int(seconds / sum(once.values()))))
        timed = time_in_turn(label, runs, rounds=rounds, timer=timer, drive=drive, errors=checked.errors)
    waiting = {name for name, run in runs.items() if isinstance(timer, EventTimer) and timer.waits(run)}
    rows = {row.provider: row for row in timed}
    rows |= {name: Row(label, name, absent=why) for name, why in absent.items()}
    rows |= {name: Row(label, name, failed=why) for name, why in checked.failed.items()}
    for name, row in rows.items():
        provider = checked.providers[name]
        row.facts = {"kind": provider.kind, "about": provider.about}
        if row.seconds:
            plan = checked.works[name].plan
            row.facts |= {"plan": plan} if plan else {}
            row.facts |= found[name] | rates(case, direction, quartiles(row.seconds)[1], limits)
            row.facts |= {"timed_by": timed_by(timer, runs[name])}
            row.facts |= {"waits_for_host": True} if name in waiting else {}
            row.facts |= {} if checked.pictures is None else {"checked_pictures": checked.pictures}
    return [rows[name] for name in checked.providers]


def about(case: Case, direction: str) -> dict[str, Any]:
    """What the results say of a case beside its rows."""
    return {
        "operator": case.operator,
        "name": case.name,
        "direction": direction,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.bytes(direction),
        "flops": case.flops(direction),
    }


def rates(case: Case, direction: str, seconds: float, limits: Mapping[str, Any]) -> dict[str, Any]:
    """GB/s and TFLOP/s of the work that the case demands, and the share of what the machine's limits allow."""
    floor = case.floor(direction, limits)
    return {
        "gb_per_s": case.bytes(direction) / seconds / 1e9,
        "tflop_per_s": case.flops(direction) / seconds / 1e12,
        "floor_s": floor,
        "share_of_limit": floor / seconds,
    }


def collect(device: torch.device) -> None:
    """Give back what the last provider left."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def first_line(error: BaseException | Warning | str) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
