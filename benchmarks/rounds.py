"""Providers of the same work, checked against float64 and then timed in turn, in one process.

Sequential blocks of rounds drift with the machine's clock and its other work; here every round times every provider
once, in an order that turns, and a ratio is the median of the ratios within the rounds.
"""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_beit.kernels.testing import assert_no_worse_than_eager

from .timers import Run, Timer, run_once, wall_seconds

Outputs = Mapping[str, Tensor]
Drive = Callable[[Callable[[], None], Callable[[], None], int], None]


class AbsentError(Exception):
    """A provider cannot run here; the message says why."""


@dataclass
class Row:
    """One provider of one case, for the table and the JSON: its seconds, or why there are none."""

    case: str
    provider: str
    seconds: list[float] = field(default_factory=list)
    absent: str = ""
    failed: str = ""
    """Why it should have run and did not: a wrong result, or a defect of ours."""
    ratio: float | None = None
    over: str = ""
    """The provider whose time `ratio` is relative to."""
    errors: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is known of it, for the JSON."""


def build(providers: Mapping[str, Callable[..., Run]], *args: Any) -> tuple[dict[str, Run], dict[str, str]]:
    """Build every provider; those that cannot run here are returned with the reason."""
    runs, absent = {}, {}
    for name, make in providers.items():
        try:
            runs[name] = make(*args)
        except AbsentError as error:
            absent[name] = str(error)
    return runs, absent


def check(name: str, outputs: Outputs, eager: Outputs, exact: Outputs, dtype: torch.dtype) -> dict[str, float]:
    """Hold a provider's outputs to the rule of `fused_beit.kernels.testing`; its errors, relative, go into the table.

    Args:
        name: the provider.
        outputs: what it computed.
        eager: the same in eager torch, with the same precision.
        exact: the same in float64.
        dtype: precision of the arithmetic. Eager torch must have half of its digits right, or it did other work.
    """
    errors = {}
    for key, reference in exact.items():
        assert outputs[key].shape == reference.shape, f"{name}: {key} has shape {tuple(outputs[key].shape)}"
        of_eager = relative_error(eager[key], reference)
        assert of_eager <= torch.finfo(dtype).eps ** 0.5, f"eager torch itself is off by {of_eager:.2e} in {key}"
        assert_no_worse_than_eager(f"{name}: {key}", outputs[key], eager[key], reference)
        errors[key] = relative_error(outputs[key], reference)
    return errors


def check_same_work(
    name: str, outputs: Outputs, eager: Outputs, exact: Outputs, dtype: torch.dtype
) -> dict[str, float]:
    """Hold a peer's outputs to what `check` asks of eager torch itself: half of the digits of `dtype` are right.

    Whether a peer did the same work is the question here, not how well it rounds: it may sum in another order, whose
    error may be any multiple of eager torch's. sqrt(eps) is as far from one rounding, eps, as from no digit right, 1.
    """
    errors = {}
    allowed = torch.finfo(dtype).eps ** 0.5
    for key, reference in exact.items():
        assert outputs[key].shape == reference.shape, f"{name}: {key} has shape {tuple(outputs[key].shape)}"
        errors[key] = relative_error(outputs[key], reference)
        assert errors[key] <= allowed, (
            f"{name}: {key}: error {errors[key]:.2e} of its norm exceeds {allowed:.2e}, half of the digits of {dtype} "
            f"(eager torch's error is {relative_error(eager[key], reference):.2e})"
        )
    return errors


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the float64 result; of a result of zeros, the difference itself."""
    return float((actual.double() - exact).norm() / (exact.norm() or 1))


def every_round(others: Callable[[], None], first: Callable[[], None], rounds: int) -> None:
    """Nothing but the rounds; pytest-benchmark drives them itself, for it keeps the times of the first one."""
    for _ in range(rounds):
        others()
        first()


def time_once(runs: Mapping[str, Run], timer: Timer) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of one run of each, and why those have none that run out of memory.

    After one that is not timed, but where the clock times what may take seconds, as a step on a CPU does.
    """
    seconds, absent = {}, {}
    for name, run in runs.items():
        try:
            if timer is not wall_seconds:
                run_once(run)
            seconds[name] = timer(run)
        except torch.OutOfMemoryError as error:
            absent[name] = no_memory(error)
        if name in absent:  # not before: until then the error holds what the run had made
            give_back()
    return seconds, absent


def no_memory(error: torch.OutOfMemoryError) -> str:
    return f"out of memory while it was timed: {str(error).strip().partition(chr(10))[0][:300]}"


def give_back() -> None:
    """Return what was left to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_in_turn(
    case: str,
    runs: Mapping[str, Run],
    *,
    rounds: int,
    timer: Timer = wall_seconds,
    drive: Drive = every_round,
    absent: Mapping[str, str] | None = None,
    errors: Mapping[str, dict[str, float]] | None = None,
) -> list[Row]:
    """Time the providers in turn.

    Args:
        case: what is timed, with its sizes.
        runs: provider -> its work, once; each was checked before. At least one.
        rounds: how often each is timed, after one or two runs that do not count.
        timer: seconds of one run.
        drive: calls its first argument, which times all providers but the first, and its second, which times that one,
            `rounds` times.
        absent: provider -> why it is not there.
        errors: provider -> errors found when it was checked.

    Returns:
        One row a provider, absent ones included, with those that ran out of memory; `ratio` is the provider's time over
        that of the first one that has a time.
    """
    rows = {name: Row(case, name, errors=dict((errors or {}).get(name, {}))) for name in runs}
    warm, lacking = time_once(runs, timer)
    first, *others = warm or [""]
    turn = 0

    def time_one(name: str) -> None:
        if name in lacking:
            return
        try:
            rows[name].seconds.append(timer(runs[name]))
        except torch.OutOfMemoryError as error:
            lacking[name] = no_memory(error)
        if name in lacking:
            give_back()

    def time_the_others() -> None:
        nonlocal turn
        for name in others[turn:] + others[:turn]:
            time_one(name)
        turn = (turn + 1) % len(others) if others else 0

    gc.collect()
    if warm:
        drive(time_the_others, lambda: time_one(first), rounds)
    for name, why in lacking.items():
        rows[name].seconds.clear()
        rows[name].absent = why

    for name in [] if first in lacking else [name for name in others if name not in lacking]:
        pairs = zip(rows[name].seconds, rows[first].seconds, strict=True)
        rows[name].ratio = statistics.median(seconds / baseline for seconds, baseline in pairs)
        rows[name].over = first
    return [*rows.values(), *(Row(case, name, absent=why) for name, why in (absent or {}).items())]


SLOWER = 3.0
"""How many times slower than eager torch, written out, ours may be in a smoke run on a processor.

It is no claim of speed: at smoke sizes it says that nothing absurd has crept in, such as a check that copies, a default
that became the slow one, or a loop in Python. What is measured of the claims stands in RESULTS.md.
"""


def hold_ratios(rows: Sequence[Row], ours: str, written_out: str, slower: float = SLOWER) -> None:
    """Fail where ours takes more than `slower` times as long as another provider, or one of both has no time.

    The fastest rounds are compared, for what else a machine does can only add to a time. Nothing is held where one of
    both was not asked for, and so has no row.
    """
    best = {row.provider: min(row.seconds) for row in rows if row.seconds}
    for row in rows:
        if row.provider in (ours, written_out):
            why = row.failed or row.absent
            assert row.seconds, f"{row.case}: {row.provider} has no time, so that nothing holds ours: {why}"
    if ours in best and written_out in best:
        times = best[ours] / best[written_out]
        assert times <= slower, (
            f"{rows[0].case}: {ours} takes {times:.1f} times as long as {written_out}, more than the {slower:g} times "
            "that a smoke run allows"
        )


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return q1, median, q3


def summary(row: Row) -> dict[str, Any]:
    """A row as it stands in the JSON; times in seconds."""
    if row.failed:
        return {"failed": row.failed, **row.facts}
    if row.absent:
        return {"absent": row.absent, **row.facts}
    q1, median, q3 = quartiles(row.seconds)
    times = {"median": median, "q1": q1, "q3": q3, "rounds": len(row.seconds), "ratio": row.ratio, "over": row.over}
    return {**times, "errors": row.errors, **row.facts}


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as aligned text: median with quartiles, and how many times the first one's time; then who is missing."""
    width = max(len(row.case) for row in rows)
    longest = max(len(row.provider) for row in rows)
    lines = [f"{'case':{width}} {'provider':{longest}} {'median ms (quartiles)':>30}  {'over first':>10}"]
    for row in rows:
        if row.seconds:
            q1, median, q3 = (1e3 * seconds for seconds in quartiles(row.seconds))
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            times = f"{median:.4g} ({q1:.4g} to {q3:.4g})"
            lines.append(f"{row.case:{width}} {row.provider:{longest}} {times:>30}  {ratio:>10}")
    untimed = [row for row in rows if not row.seconds]
    for why in dict.fromkeys(row.failed or row.absent for row in untimed):
        missing = [row for row in untimed if (row.failed or row.absent) == why]
        names = list(dict.fromkeys(row.provider for row in missing))
        # Where some of their rows have a time or another reason, the cases are named.
        everywhere = len(missing) == sum(row.provider in names for row in rows)
        cases = "" if everywhere else f" ({'; '.join(dict.fromkeys(row.case for row in missing))})"
        lines.append(f"not timed: {'; '.join(names)}{cases}: {why}")
    return lines
