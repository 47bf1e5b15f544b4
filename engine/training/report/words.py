"""Numbers and sentences of a report, for a reader who does not know the settings."""

import math
from typing import Any

from .content import Report, last_values, number

THIN = "\u202f"  # narrow no-break space


def percent(share: float) -> str:
    """A share as per cent, two significant digits below ten: 48 %, 1.9 %, 0.31 %."""
    value = 100 * share
    decimals = 0 if abs(value) >= 9.95 or value == 0 else 1 if abs(value) >= 0.995 else 2
    return f"{value:.{decimals}f}{THIN}%"


def plain(value: float) -> str:
    """A number with three significant digits, and thousands set apart."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return _scientific(value, 2)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))
    return f"{value:.{decimals}f}"


def compact(value: float) -> str:
    """A round number in few letters, for an axis: 800, 12k, 1.5M, 5e-5."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e12:
        return _scientific(value, 3)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:,g}" if value == int(value) else f"{value:g}"


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 48 s, 1 min 48 s, 3 h 5 min, 2 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {name}" + (f" {rest} {part_name}" if rest else "")
    return f"{whole} s"


def count(number_of: int, thing: str) -> str:
    """A number and its noun: 1 step, 660 steps."""
    return f"{number_of:,} {thing}{'' if number_of == 1 else 's'}"


def setting(value: Any) -> str:
    """A setting as one would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value)
    return str(value)


def headline(report: Report) -> str:
    """What happened, in half a sentence."""
    accuracy, share = number(report.val_mlm_acc), number(report.commonest_share)
    if accuracy is None:
        steps = count(report.steps, "step") if report.steps else "no step"
        return f"{report.model} ran {steps} on {report.subject}"
    if share is not None and share > 0.9:
        return f"The tokens of {report.subject} are nearly all the same: nothing to learn"
    if share is None or accuracy >= 1.5 * share or 1 - accuracy <= (1 - share) / 2:
        return f"{report.model} learned to fill\u00a0in {report.subject}"
    if accuracy > share:
        return f"{report.model} has begun to learn to fill\u00a0in {report.subject}"
    return f"{report.model} has not yet learned to fill\u00a0in {report.subject}"


def deck(report: Report) -> str:
    """The sentence under the headline: the result beside what guessing gives."""
    accuracy, share = number(report.val_mlm_acc), number(report.commonest_share)
    guess = "" if share is None else f"; always guessing the commonest token would give {percent(share)}"
    if accuracy is not None:
        on = count(report.val_pictures, "held-out picture") if report.val_pictures else "held-out pictures"
        return f"On {on} it names the hidden token right {percent(accuracy)} of the time{guess}."
    trained = last_values(report.history, ("mlm_acc",))["mlm_acc"]
    if trained is not None:
        return (
            f"On its training pictures it names the hidden token right {percent(trained)} of the time{guess}. "
            "No held-out pictures were evaluated."
        )
    return "No accuracy was measured."


def facts(report: Report) -> str:
    """How much was done, on what: one line."""
    parts = []
    if report.steps is not None:
        parts.append(count(report.steps, "step"))
    if (seen := number(report.images_seen)) is not None:
        parts.append(count(int(seen), "picture") + " seen")
    if (seconds := number(report.duration)) is not None:
        parts.append(duration(seconds))
    if report.machine:
        parts.append(setting(next(iter(report.machine.values()))))
    if report.finished:
        parts.append(report.finished)
    return " · ".join(part.replace(" ", "\u00a0") if len(part) < 24 else part for part in parts)


def against(value: float, limit: float, name: str) -> str:
    """How far a loss lies from a limit: "46 % below the token entropy, 2.86"."""
    if limit <= 0:
        return f"{name}: {plain(limit)}"
    change = value / limit - 1
    if abs(change) < 0.0005:
        return f"equal to {name}, {plain(limit)}"
    return f"{percent(abs(change))} {'below' if change < 0 else 'above'} {name}, {plain(limit)}"
