"""A profile as one HTML file: the sentence, the step as a bar, the table. Nothing is loaded, no script is needed."""

from html import escape
from pathlib import Path

from ..checkpoint import replace_durably
from ..report.style import STYLE
from .measure import Profile
from .table import MEANING, Row, milliseconds, notes, rows, scale, sentence, unit

# Of the rows, in their order: waiting is the accent, then what the model does, then what is around it.
COLOURS = (
    *("#c2410c", "#e08a5c", "#8a6fb0", "#9fc3d8", "#2f6690", "#5b94b8"),
    *("#b9cbb4", "#78a083", "#c9a227", "#a04668", "#b9b4a8"),
)
OWN_STYLE = """
svg.step { width:100%; height:auto; display:block }
svg.step text { font:13px var(--sans); fill:#fff }
table { border-collapse:collapse; width:100%; font-size:.9rem }
th, td { padding:.3rem .6rem; text-align:right; border-bottom:1px solid var(--line); vertical-align:baseline }
th { font-weight:600; color:var(--soft) }
th:first-child, td:first-child, td:last-child, th:last-child { text-align:left }
td:last-child { color:var(--soft); font-size:.84rem }
tr.sum td { font-weight:600 }
.swatch { display:inline-block; width:.75em; height:.75em; border-radius:2px; margin-right:.5em }
.scroll { overflow-x:auto }
"""
WIDTH, HEIGHT = 1000, 64


def write_page(path: Path, profile: Profile, trace: str) -> None:
    """Write the page, replacing an earlier one in one piece; `trace` is the name of the trace beside it."""
    replace_durably(path, lambda temporary: temporary.write_text(render(profile, trace)))


def render(profile: Profile, trace: str) -> str:
    """The page as text."""
    parts = rows(profile)
    explain = "".join(f"<p>{escape(note)}</p>" for note in notes(profile))
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in profile.facts.items())
    step = f"{milliseconds(profile.step_seconds)} ms, {profile.pace.per_s:,.1f} pictures/s on a rank"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>Where a step\u2019s time goes</title>'
        f"<style>{STYLE}{OWN_STYLE}</style></head>\n<body><main>"
        f'<header><p class="eyebrow">Profile of a step <span>{escape(profile.facts["preset"])}</span></p>'
        f'<h1 class="long">{escape(sentence(profile))}</h1><p class="facts">{escape(step)}</p></header>\n'
        f"<section><h2>One step</h2>{bar(parts)}</section>\n"
        f'<section><h2>Part by part</h2><div class="scroll">{html_table(profile, parts)}</div>{explain}</section>\n'
        f"<section><h2>Every operator</h2><p><code>{escape(trace)}</code> holds the trace of torch\u2019s profiler; "
        "open it in Perfetto (ui.perfetto.dev) or in chrome://tracing.</p></section>\n"
        f'<section><h2>What was run</h2><div class="table"><dl>{facts}</dl></div></section>\n'
        "</main><footer>Written by Fused BEiT</footer></body></html>\n"
    )


def bar(parts: list[Row]) -> str:
    """The step as one bar, its parts as long as they take; where there is room, with name and share."""
    total = sum(row.seconds for row in parts)
    at, pieces = 0.0, []
    for row, colour in zip(parts, COLOURS, strict=True):
        width = WIDTH * row.seconds / total
        title = f"<title>{escape(row.name)}: {milliseconds(row.seconds)} ms, {row.seconds / total:.1%}</title>"
        pieces.append(f'<g><rect x="{at:.2f}" y="0" width="{width:.2f}" height="{HEIGHT}" fill="{colour}"/>{title}')
        if width > 8.5 * len(row.name):
            pieces.append(
                f'<text x="{at + 6:.2f}" y="26">{escape(row.name)}</text>'
                f'<text x="{at + 6:.2f}" y="46">{row.seconds / total:.0%}</text>'
            )
        pieces.append("</g>")
        at += width
    return f'<svg class="step" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="parts">{"".join(pieces)}</svg>'


def html_table(profile: Profile, parts: list[Row]) -> str:
    head = ["", "forward", "backward", "ms", "share", unit(profile), ""]
    lines = []
    for row, colour in zip(parts, COLOURS, strict=True):
        rate = "" if row.flops_per_s is None else f"{row.flops_per_s / scale(profile):.1f}"
        cells = [milliseconds(row.forward), milliseconds(row.backward), milliseconds(row.seconds)]
        cells += [f"{row.seconds / profile.step_seconds:.1%}", rate, MEANING[row.name]]
        name = f'<td><i class="swatch" style="background:{colour}"></i>{escape(row.name)}</td>'
        lines.append(f"<tr>{name}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    rate = f"{sum(profile.flops.values()) / profile.step_seconds / scale(profile):.1f}"
    total = ["step", "", "", milliseconds(profile.step_seconds), "100%", rate, ""]
    lines.append(f'<tr class="sum">{"".join(f"<td>{escape(cell)}</td>" for cell in total)}</tr>')
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{''.join(lines)}</table>"
