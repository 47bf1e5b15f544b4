"""Line charts as HTML around an SVG that stretches in x: letters, dots and strokes keep their size on any screen.

Vertical units are CSS pixels; horizontal ones are thousandths of the plot's width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .words import compact, percent, plain

Curve = NDArray[np.float64]  # [n]
Unit = Literal["plain", "percent"]

WIDTH = 1000
MAX_POINTS = 240
MAX_DOTS = 40
LABEL_PX = 36  # height of a two-line label beside the curve's end
TYPICAL_WIDTHS = (230, 460)  # plot on a phone and on a desktop, in pixels, to judge where a label is free of curves


@dataclass(frozen=True)
class Series:
    """One quantity over steps: float64 [n] each, NaN where there is no value."""

    label: str
    steps: Curve
    values: Curve
    accent: bool = False
    """Drawn in the accent colour and with a dot at every point."""


@dataclass(frozen=True)
class Chart:
    """What one chart shows."""

    title: str
    note: str
    series: Sequence[Series]
    reference: tuple[str, float] | None = None
    """Label and value of a horizontal line to compare with."""
    unit: Unit = "plain"
    from_zero: bool = False
    height: int = 230
    """Height of the plot in pixels."""
    labelled: bool = True
    """Name the curves at their ends; off: only the title names the one curve."""


@dataclass(frozen=True)
class Binned:
    """A curve of at most `MAX_POINTS` points; low and high bound the values of a bin, none when nothing was merged."""

    steps: Curve
    mean: Curve
    low: Curve | None = None
    high: Curve | None = None


def bin_curve(steps: Curve, values: Curve, max_points: int = MAX_POINTS) -> Binned:
    """Merge a long curve into bins of equally many rows; a bin without a finite value is NaN, so a gap stays one."""
    if len(steps) <= max_points:
        return Binned(steps, values)
    bounds = np.linspace(0, len(steps), max_points + 1).astype(int)
    rows = []
    for start, stop in pairwise(bounds):
        finite = values[start:stop][np.isfinite(values[start:stop])]
        centre = float(steps[start:stop].mean())
        rows.append((centre, finite.mean(), finite.min(), finite.max()) if finite.size else (centre, *[np.nan] * 3))
    # The ends stay at the first and last step, so that merging does not shorten the curve.
    binned = np.array(rows, dtype=np.float64)
    binned[0, 0], binned[-1, 0] = steps[0], steps[-1]
    return Binned(*binned.T)


def nice_step(span: float, target: int) -> float:
    """A step of 1, 2, 2.5 or 5 times a power of ten that cuts a span into about `target` pieces, never more."""
    rough = span / target
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def nice_ticks(low: float, high: float, target: int) -> list[float]:
    """Round values from at or below `low` to at or above `high`, about `target` apart; `low` must be below `high`."""
    step = nice_step(high - low, target)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def value_range(chart: Chart) -> tuple[float, float, float | None]:
    """Lowest and highest value to show, and the true highest one where a few spikes would flatten the rest."""
    finite = np.concatenate([series.values[np.isfinite(series.values)] for series in chart.series])
    low, high, cut = float(finite.min()), float(finite.max()), None
    if finite.size >= 20:
        q05, q95 = np.quantile(finite, [0.05, 0.95])
        if high - q95 > 8 * (q95 - q05) > 0:
            cut, high = high, float(q95 + 2 * (q95 - q05))
    if chart.reference:
        low, high = min(low, chart.reference[1]), max(high, chart.reference[1])
    if chart.from_zero:
        low = min(low, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) / 2 or 0.5
        low, high = (low if chart.from_zero else low - pad), high + pad
    return low, high, cut


def draw(chart: Chart) -> str:
    """A chart as an HTML figure; an empty string when no series has a finite value."""
    chart = _without_empty(chart)
    if not chart.series:
        return ""
    low, high, cut = value_range(chart)
    ticks = nice_ticks(low, high, 5 if chart.height >= 160 else 2)
    low, high = ticks[0], ticks[-1]
    steps = np.concatenate([series.steps[np.isfinite(series.values)] for series in chart.series])
    first, last = float(steps.min()), float(steps.max())
    step_ticks = _step_ticks(first, last, 4 if chart.height >= 160 else 3)
    if first == last:
        first, last = first - 1, last + 1

    def place_y(values: Curve) -> Curve:
        return chart.height * (1 - (np.clip(values, low, high) - low) / (high - low))

    def place_x(values: Curve) -> Curve:
        return WIDTH * (values - first) / (last - first)

    svg, labels = [], []
    tick_texts = _tick_texts(ticks, chart.unit)
    for tick, text in zip(ticks, tick_texts, strict=True):
        y = float(place_y(np.array(tick)))
        svg.append(f'<line class="tick" data-value="{tick:g}" x1="0" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        labels.append(f'<span class="y" style="top:{y:.1f}px">{text}</span>')
    for tick in step_ticks:
        x = float(place_x(np.array(tick))) / WIDTH
        labels.append(f'<span class="x" style="left:{x:.2%}">{compact(tick)}</span>')

    labels.append('<span class="x unit">step</span>' if chart.labelled else "")

    ends: list[tuple[float, Series, float]] = []
    placed: list[tuple[Curve, Curve]] = []
    for series in chart.series:
        binned = bin_curve(series.steps, series.values)
        x_curve, y_curve = place_x(binned.steps), place_y(binned.mean)
        if binned.low is not None and binned.high is not None:
            svg.append(f'<path class="band" d="{_band_path(x_curve, place_y(binned.low), place_y(binned.high))}"/>')
        svg.append(_curve_paths(x_curve, y_curve, series.accent))
        finite = np.flatnonzero(np.isfinite(binned.mean))
        ends.append((float(y_curve[finite[-1]]), series, float(binned.mean[finite[-1]])))
        placed.append((x_curve[finite], y_curve[finite]))
    if chart.reference:
        name, value = chart.reference
        y_ref = float(place_y(np.array(value)))
        svg.append(f'<line class="reference" x1="0" x2="{WIDTH}" y1="{y_ref:.1f}" y2="{y_ref:.1f}"/>')
        text = f"{name} {_value_text(value, chart.unit)}"
        side, above = _free_side(y_ref, text, placed, chart.height)
        labels.append(f'<span class="at-line {side} {above}" style="top:{y_ref:.1f}px">{escape(text)}</span>')
    if chart.labelled:
        labels += _end_labels(ends, chart)

    note = chart.note if cut is None else f"{chart.note}; highest value {_value_text(cut, chart.unit)}, cut off"
    summary = "; ".join(f"{s.label or 'last value'} {_value_text(value, chart.unit)}" for _, s, value in ends)
    margin = 12 + 7 * max(len(text) for text in tick_texts)
    return (
        f'<figure class="chart{"" if chart.labelled else " bare"}">'
        f"<figcaption><b>{escape(chart.title)}</b> <span>{escape(note)}</span></figcaption>"
        f'<div class="plot" style="height:{chart.height}px;margin-left:{margin}px">'
        f'<svg viewBox="0 0 {WIDTH} {chart.height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{chart.title} over the steps: {summary}")}">{"".join(svg)}</svg>'
        f"{''.join(labels)}</div></figure>"
    )


def _without_empty(chart: Chart) -> Chart:
    kept = [series for series in chart.series if np.isfinite(series.values).any()]
    reference = chart.reference if chart.reference and math.isfinite(chart.reference[1]) else None
    return Chart(**{**chart.__dict__, "series": kept, "reference": reference})


def _step_ticks(first: float, last: float, target: int) -> list[float]:
    """Whole steps within the range."""
    if last - first <= 2:
        return [float(step) for step in range(math.ceil(first), math.floor(last) + 1)]
    step = max(1.0, nice_step(last - first, target))
    return [index * step for index in range(math.ceil(first / step), math.floor(last / step) + 1)]


def _tick_texts(ticks: Sequence[float], unit: Unit) -> list[str]:
    """All ticks of an axis with the same number of decimals."""
    scale, suffix = (100, "\u202f%") if unit == "percent" else (1, "")
    spread = (ticks[1] - ticks[0]) * scale
    if scale == 1 and (abs(spread) >= 1000 or abs(spread) < 1e-4):
        return [compact(tick) for tick in ticks]
    decimals = max(0, -math.floor(math.log10(spread) + 1e-9))
    if abs(spread * 10**decimals - round(spread * 10**decimals)) > 1e-6:
        decimals += 1  # a step of 2.5 units
    return [f"{tick * scale:,.{decimals}f}{suffix}" for tick in ticks]


def _value_text(value: float, unit: Unit) -> str:
    return percent(value) if unit == "percent" else plain(value)


def _segments(*curves: Curve) -> list[slice]:
    """Runs of points where all curves are finite."""
    finite = np.concatenate([[False], np.logical_and.reduce([np.isfinite(c) for c in curves]), [False]])
    edges = np.flatnonzero(np.diff(finite.astype(np.int8)))
    return [slice(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _points(x: Curve, y: Curve) -> str:
    return "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def _curve_paths(x: Curve, y: Curve, accent: bool) -> str:
    """The line, broken at gaps, and dots: at lone points, and at every point of an accent curve that has few."""
    runs = _segments(y)
    line = "".join("M" + _points(x[run], y[run]) for run in runs if run.stop - run.start > 1)
    every = accent and int(np.isfinite(y).sum()) <= MAX_DOTS
    lone = [index for run in runs for index in range(run.start, run.stop) if every or run.stop - run.start == 1]
    # A line of no length with round caps is a dot that the stretching leaves round.
    dots = "".join(f"M{x[index]:.1f} {y[index]:.1f}h0" for index in lone)
    kind = "held-out" if accent else "training"
    return (f'<path class="curve {kind}" d="{line}"/>' if line else "") + (
        f'<path class="dots {kind}" d="{dots}"/>' if dots else ""
    )


def _band_path(x: Curve, low: Curve, high: Curve) -> str:
    return "".join(
        f"M{_points(x[run], high[run])}L{_points(x[run][::-1], low[run][::-1])}Z" for run in _segments(x, low, high)
    )


def _free_side(y: float, text: str, placed: Sequence[tuple[Curve, Curve]], height: int) -> tuple[str, str]:
    """Side (left, right) and place (over, under) where a label on a line at height `y` covers least of the curves."""
    best, best_cost = ("right", "over"), math.inf
    for side in ("right", "left"):
        for where, top in (("over", y - 19), ("under", y + 3)):
            cost = 0.0 if top >= 0 and top + 16 <= height else 5.0
            for width in TYPICAL_WIDTHS:
                share = WIDTH * min(1.0, 6.4 * len(text) / width)
                left = WIDTH - share if side == "right" else 0.0
                for curve_x, curve_y in placed:
                    dense_x = np.linspace(left, left + share, 60)
                    inside = (dense_x >= curve_x[0]) & (dense_x <= curve_x[-1])
                    dense_y = np.interp(dense_x, curve_x, curve_y)
                    cost += float((inside & (dense_y > top - 3) & (dense_y < top + 19)).mean())
            if cost < best_cost - 1e-9:
                best, best_cost = (side, where), cost
    return best


def _end_labels(ends: Sequence[tuple[float, Series, float]], chart: Chart) -> list[str]:
    """Name and last value of each curve at its right end, pushed apart where they would overlap."""
    ordered = sorted(ends, key=lambda end: end[0])
    tops = [end[0] - LABEL_PX / 2 for end in ordered]
    for index in range(1, len(tops)):
        tops[index] = max(tops[index], tops[index - 1] + LABEL_PX)
    shift = max(0.0, tops[-1] + LABEL_PX - chart.height - 8)
    tops = [top - shift for top in tops]
    for index in range(len(tops) - 2, -1, -1):
        tops[index] = min(tops[index], tops[index + 1] - LABEL_PX)
    return [
        f'<span class="end {"held-out" if series.accent else "training"}" style="top:{top:.1f}px">'
        f"{escape(series.label)}<b>{_value_text(value, chart.unit)}</b></span>"
        for top, (_, series, value) in zip(tops, ordered, strict=True)
    ]
