"""The report as one HTML file: nothing is loaded, no script is needed."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from . import charts
from .content import Report, curve, number
from .pictures import picture_rows
from .style import STYLE
from .words import THIN, against, count, deck, duration, facts, headline, percent, plain, setting

MAX_BAD_LISTED = 50


def write_report(path: Path, report: Report) -> None:
    """Write a report as one self-contained HTML file, replacing an earlier one in one piece.

    Args:
        path: the file, usually `report.html` in the output folder; its folder is made when absent.
        report: what to show; missing and not finite values are left out or named as missing.

    Raises:
        ValueError: a picture is not uint8 [H, W, 3].
        OSError: the file cannot be written.
    """
    html = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(html.encode("utf-8", "replace"))  # a file name may hold bytes that are no text
    os.replace(temporary, path)


def render(report: Report) -> str:
    """The page as text."""
    title = f"{headline(report)}: {report.title}"
    sections = [
        _head(report),
        _key_figures(report),
        _section("What it sees, and what it makes of it", picture_rows(report.pictures)),
        _section("How it got there", _curves(report)),
        _section("What next", _next(report), "next"),
        _section("How it was run", _run(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main>\n{chr(10).join(section for section in sections if section)}\n</main>"
        "<footer>Written by Fused BEiT</footer></body></html>\n"
    )


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{body}</section>' if body else ""


def _head(report: Report) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in [*report.notes, *_warnings(report)])
    return (
        f'<header><p class="eyebrow">Pre-training report <span>{escape(report.title)}</span></p>'
        f'<h1 class="{"long" if len(headline(report)) > 70 else "short"}">{escape(headline(report))}</h1>'
        f'<p class="deck">{escape(deck(report))}</p><p class="facts">{escape(facts(report))}</p>{notes}</header>'
    )


def _warnings(report: Report) -> list[str]:
    warnings = []
    if report.skipped_steps:
        warnings.append(f"{count(report.skipped_steps, 'step')} skipped: the gradient was not finite.")
    if report.bad_count:
        listed = ", see the end of this page" if report.bad_pictures else ""
        warnings.append(f"{count(report.bad_count, 'picture')} could not be read and gave way to others{listed}.")
    return warnings


def _key_figures(report: Report) -> str:
    figures = []
    accuracy, share = number(report.val_mlm_acc), number(report.commonest_share)
    loss, entropy = number(report.val_loss), number(report.token_entropy)
    if accuracy is not None:
        below = "" if share is None else f"the commonest token alone: {percent(share)}"
        if share and accuracy > share:
            below = f"{accuracy / share:.1f} times the commonest token\u2019s {percent(share)}"
        figures.append(_figure(percent(accuracy), "of hidden tokens named right", below, _bar(accuracy, share, 1.0)))
    if loss is not None:
        below = "" if entropy is None else against(loss, entropy, "the token entropy")
        scale = max(loss, entropy or 0.0) or 1.0
        figures.append(_figure(plain(loss), "held-out loss, in nats", below, _bar(loss, entropy, scale)))
    if (seen := number(report.images_seen)) is not None:
        below = "" if (seconds := number(report.duration)) is None else f"in {duration(seconds)}"
        shown = f"{int(seen):,}" if seen < 1e7 else f"{plain(seen / 1e6)}{THIN}M"
        figures.append(_figure(shown, "pictures seen in training", below))
    speed = _median(report, "images_per_s")
    if speed is not None:
        wait = _median(report, "data_wait")
        below = "" if wait is None else f"{percent(wait)} of the time spent waiting for data"
        figures.append(_figure(plain(speed), "pictures a second", below))
    return f'<section class="figures">{"".join(figures)}</section>' if figures else ""


def _figure(value: str, meaning: str, below: str, bar: str = "") -> str:
    return f"<div><b>{escape(value)}</b><span>{escape(meaning)}</span>{bar}<small>{escape(below)}</small></div>"


def _bar(value: float, mark: float | None, scale: float) -> str:
    """A thin bar for a value, with a mark for what guessing gives."""
    tick = "" if mark is None else f'<i class="mark" style="left:{min(1.0, max(0.0, mark / scale)):.1%}"></i>'
    return f'<i class="bar"><i style="width:{min(1.0, max(0.0, value / scale)):.1%}"></i>{tick}</i>'


def _median(report: Report, name: str) -> float | None:
    _, values = curve(report.history, name)
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def _varies(report: Report, name: str) -> bool:
    _, values = curve(report.history, name)
    return np.unique(values[np.isfinite(values)]).size > 1


def _curves(report: Report) -> str:
    def series(label: str, name: str, accent: bool = False) -> charts.Series:
        return charts.Series(label, *curve(report.history, name), accent)

    entropy, share = number(report.token_entropy), number(report.commonest_share)
    large = [
        charts.Chart(
            "Loss",
            "nats a hidden token, lower is better",
            [series("training", "loss"), series("held out", "val_loss", True)],
            reference=None if entropy is None else ("token entropy", entropy),
        ),
        charts.Chart(
            "Accuracy",
            "hidden tokens named right, higher is better",
            [series("training", "mlm_acc"), series("held out", "val_mlm_acc", True)],
            reference=None if share is None else ("commonest token", share),
            unit="percent",
            from_zero=True,
        ),
    ]
    subjects: list[tuple[str, str, str, charts.Unit]] = [
        ("Learning rate", "", "lr", "plain"),
        ("Weight decay", "", "weight_decay", "plain"),
        ("Gradient norm", "before clipping", "grad_norm", "plain"),
        ("Speed", "pictures a second", "images_per_s", "plain"),
        ("Waiting for data", "share of time", "data_wait", "percent"),
    ]
    small = [
        charts.Chart(title, note, [series("", name)], unit=unit, from_zero=True, height=84, labelled=False)
        for title, note, name, unit in subjects
        if name != "weight_decay" or _varies(report, name)
    ]
    drawn_large, drawn_small = ("".join(map(charts.draw, group)) for group in (large, small))
    if not drawn_large and not drawn_small:
        return '<p class="absent">No finite value was logged.</p>'
    explain = (
        "The token entropy is the loss of knowing only how frequent each token is; the commonest token\u2019s share is "
        "the accuracy of always guessing it. Everything beyond these lines was learned from the visible patches."
    )
    if 'class="band"' in drawn_large:
        explain += " A line is the mean of neighbouring steps, its band reaches from the lowest to the highest of them."
    bottleneck = f'<p class="explain">{escape(report.bottleneck)}</p>' if report.bottleneck else ""
    return (
        f'<div class="large">{drawn_large}</div><p class="explain">{escape(explain)}</p>'
        f'<div class="small-charts">{drawn_small}</div>{bottleneck}'
    )


def _next(report: Report) -> str:
    parts = []
    if report.checkpoint:
        parts.append(f"<p>The weights are in <code>{escape(report.checkpoint)}</code></p>")
    if report.next_command:
        parts.append(f"<p>{escape(report.next_purpose or 'To go on, type')}</p>")
        parts.append(f'<pre class="command"><code>{escape(report.next_command)}</code></pre>')
    return "".join(parts)


def _run(report: Report) -> str:
    parts = [
        _table("Settings that change the result", _grouped(report.settings_result), "groups"),
        _table("Settings that change only speed", _grouped(report.settings_speed), "groups"),
        _table("Tokenizer", {"": report.tokenizer} if report.tokenizer else {}),
        _table("Machine and versions", {"": report.machine} if report.machine else {}),
        f"<h3>Skipped steps and pictures</h3>{_incidents(report)}",
    ]
    return "".join(parts)


def _grouped(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"section.field": value} as {"section": {"field": value}}."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = str(key).rpartition(".")
        groups.setdefault(section or "run", {})[name] = value
    return groups


def _table(title: str, groups: Mapping[str, Mapping[str, Any]], kind: str = "") -> str:
    if not groups:
        return ""
    lists = []
    for name, values in groups.items():
        rows = "".join(
            f"<div><dt>{escape(str(key))}</dt><dd>{escape(setting(value))}</dd></div>" for key, value in values.items()
        )
        lists.append(f"<div>{f'<h4>{escape(name)}</h4>' if name else ''}<dl>{rows}</dl></div>")
    return f'<h3>{escape(title)}</h3><div class="table {kind}">{"".join(lists)}</div>'


def _incidents(report: Report) -> str:
    skipped = count(report.skipped_steps, "step") if report.skipped_steps else "No step"
    sentence = f"{skipped} {'were' if report.skipped_steps > 1 else 'was'} skipped."
    bad = max(report.bad_count, len(report.bad_pictures))
    if not bad:
        return f"<p>{sentence} Every picture could be read.</p>"
    listed: Sequence[str] = report.bad_pictures[:MAX_BAD_LISTED]
    items = "".join(f"<li>{escape(str(item))}</li>" for item in listed)
    more = f"<li>and {bad - len(listed):,} more</li>" if bad > len(listed) and listed else ""
    return f'<p>{sentence} {count(bad, "picture")} could not be read:</p><ul class="bad">{items}{more}</ul>'
