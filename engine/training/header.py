"""What a run prints before it starts: what it will do, on what, and what each thing was resolved to."""

import math
from collections.abc import Mapping

from ..config import Recompute, Settings, result_settings, speed_settings

RECOMPUTED: Mapping[Recompute, str] = {
    "none": "nothing",
    "mlp": "in the backward pass, what is within the MLP of each block",
    "block": "in the backward pass, all of each block but its inputs",
}
"""What is computed twice to save memory."""


def when_compiled(settings: Settings) -> str:
    """What is to be said behind an estimate of memory, which is of blocks as they are written."""
    return "; compiled blocks keep another amount (train.compile)" if settings.train.compile else ""


def header(settings: Settings, sections: Mapping[str, Mapping[str, str]]) -> str:
    """The run's header.

    Args:
        settings: resolved settings; those that change the result are printed apart from those that change the speed.
        sections: further blocks, as `{title: {name: value}}`.
    """
    blocks = dict(sections) | {
        "settings that change the result": in_lines(result_settings(settings)),
        "settings that change only the speed": in_lines(speed_settings(settings)),
    }
    lines = []
    for title, values in blocks.items():
        lines.append(title)
        width = max((len(name) for name in values), default=0)
        lines += [f"  {name:<{width}}  {value}" for name, value in values.items()]
    return "\n".join(lines)


def in_lines(values: Mapping[str, object]) -> dict[str, str]:
    """Settings as one line a section: `{"optim": "lr=0.0015 min_lr=1e-05 ..."}`."""
    sections: dict[str, list[str]] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section or "run", []).append(f"{field}={value}")
    return {section: " ".join(fields) for section, fields in sections.items()}


def human_bytes(count: float) -> str:
    """`1.5 GB` and the like."""
    if count < 1:
        return "0 B"
    power = min(int(math.log(count, 1000)), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
