"""What attention is to reach, and whether rows of results say that it does."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .attention import BACKWARD, BOTH, FORWARD
from .attention_providers import OURS, PEER

Rows = dict[tuple[str, str, str], dict[str, Any]]
"""Rows that have a time, by case, direction and provider."""


class Target(NamedTuple):
    """A figure to be reached: `wanted` at most or at least."""

    what: str
    wanted: float
    at_most: bool
    unit: str
    value: Callable[[Rows], float | None]
    """The figure that was measured; None where it was not."""


def microseconds(case: str, direction: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        row = rows.get((case, direction, "triton"))
        return None if row is None else 1e6 * row["median"]

    return value


def over_ours(case: str, *providers: str) -> Callable[[Rows], float | None]:
    """How many times our time the fastest provider takes, forward and backward: of these, or of all that are exact."""

    def value(rows: Rows) -> float | None:
        ratios = [
            row["ratio"]
            for (of, direction, name), row in rows.items()
            if (of, direction, row["over"]) == (case, BOTH, "triton")
            and (name in providers if providers else row["kind"] == PEER)
        ]
        return min(ratios, default=None)

    return value


def extra_megabytes(case: str) -> Callable[[Rows], float | None]:
    """Memory above inputs, output and gradients, in the mode of ours that takes least."""

    def value(rows: Rows) -> float | None:
        sizes = [
            row["extra_bytes"] / 1e6
            for (of, direction, _), row in rows.items()
            if (of, direction, row["kind"]) == (case, BOTH, OURS) and "extra_bytes" in row
        ]
        return min(sizes, default=None)

    return value


TARGETS = (
    Target("base: forward", 60, True, "us", microseconds("base", FORWARD)),
    Target("base: backward with the gradient of the bias", 160, True, "us", microseconds("base", BACKWARD)),
    Target("base: times faster than the fastest exact alternative", 3, False, "x", over_ours("base")),
    Target("base: speed of flash without a bias", 0.9, False, "x", over_ours("base", "flash-no-bias")),
    Target("base: extra memory in one mode", 25, True, "MB", extra_megabytes("base")),
    Target("n577: speed of flash without a bias", 0.6, False, "x", over_ours("n577", "flash-no-bias")),
    Target("n1025: speed of flash without a bias", 0.6, False, "x", over_ours("n1025", "flash-no-bias")),
)


def verdicts(rows: Iterable[dict[str, Any]], *, rehearsal: bool) -> list[dict[str, Any]]:
    """Each target with what was measured: held, missed or not measured; in a rehearsal, rehearsed."""
    timed: Rows = {(row["case"], row["direction"], row["provider"]): row for row in rows if "median" in row}
    found = []
    for target in TARGETS:
        value = target.value(timed)
        if value is None:
            verdict = "not measured"
        elif rehearsal:
            verdict = "rehearsed"
        else:
            verdict = "held" if (value <= target.wanted if target.at_most else value >= target.wanted) else "missed"
        bound = f"{'at most' if target.at_most else 'at least'} {target.wanted:g} {target.unit}"
        found.append({"target": target.what, "wanted": bound, "value": value, "unit": target.unit, "verdict": verdict})
    return found
