"""Providers of the same work, checked against float64 and then timed in turn, in one process.

Sequential blocks of rounds drift with the machine's clock and its other work; here every round times every provider
once, in an order that turns, and a ratio is the median of the ratios within the rounds.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_beit.kernels.testing import assert_no_worse_than_eager

Outputs = Mapping[str, Tensor]
Run = Callable[[], Any]


class AbsentError(Exception):
    """A provider cannot run here; the message says why."""


@dataclass
class Row:
    """One provider of one case, for the table and the JSON."""

    case: str
    provider: str
    seconds: list[float] = field(default_factory=list)
    absent: str = ""
    ratio: float | None = None
    errors: dict[str, float] = field(default_factory=dict)


ROWS = pytest.StashKey[list[Row]]()


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


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the float64 result."""
    return float((actual.double() - exact).norm() / exact.norm())


def time_in_turn(
    benchmark: Any,
    case: str,
    runs: Mapping[str, Run],
    *,
    rounds: int,
    absent: Mapping[str, str] | None = None,
    errors: Mapping[str, dict[str, float]] | None = None,
) -> list[Row]:
    """Time the providers in turn; pytest-benchmark keeps those of the first.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: what is timed, with its sizes.
        runs: provider -> its work, once; each was checked before.
        rounds: how often each is timed, after one run that is not.
        absent: provider -> why it is not there.
        errors: provider -> errors found when it was checked.

    Returns:
        One row a provider, absent ones included; `ratio` is the provider's time over the first one's.
    """
    first, *others = runs
    rows = {name: Row(case, name, errors=dict((errors or {}).get(name, {}))) for name in runs}
    for run in runs.values():
        timed(run)

    def time_the_others() -> None:
        turn = len(rows[others[0]].seconds) % len(others) if others else 0
        for name in others[turn:] + others[:turn]:
            rows[name].seconds.append(timed(runs[name]))

    def time_the_first() -> None:
        rows[first].seconds.append(timed(runs[first]))

    gc.collect()
    benchmark.pedantic(time_the_first, setup=time_the_others, rounds=rounds, iterations=1, warmup_rounds=0)

    baseline = np.array(rows[first].seconds)
    for name in others:
        rows[name].ratio = float(np.median(np.array(rows[name].seconds) / baseline))
    found = [*rows.values(), *(Row(case, name, absent=why) for name, why in (absent or {}).items())]
    benchmark.extra_info["case"] = case
    benchmark.extra_info["providers"] = {row.provider: summary(row) for row in found}
    return found


def timed(run: Run) -> float:
    """Seconds of one run, the device's work included."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def summary(row: Row) -> dict[str, Any]:
    """A row as it stands in the JSON; times in seconds."""
    if row.absent:
        return {"absent": row.absent}
    q1, median, q3 = np.percentile(row.seconds, [25, 50, 75])
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(row.seconds), "ratio": row.ratio, "errors": row.errors}


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as aligned text: median with quartiles, and how many times the first one's time."""
    lines = [f"{'case':44} {'provider':24} {'median ms (quartiles)':>30}  {'over first':>10}"]
    for row in rows:
        if row.absent:
            lines.append(f"{row.case:44} {row.provider:24} {row.absent:>30}")
            continue
        q1, median, q3 = np.percentile(row.seconds, [25, 50, 75]) * 1e3
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"{row.case:44} {row.provider:24} {f'{median:.4g} ({q1:.4g} to {q3:.4g})':>30}  {ratio:>10}")
    return lines
