"""Plots of results as SVG, drawn by hand so that the same results give the same bytes everywhere."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#444444", "#e07b39", "#008b8b", "#8b4513", "#708090")
WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
LINE = 16
"""Height of a line of text."""

Point = tuple[float, float]


class Axis:
    """From values to pixels; `low` and `high` are the values at the pixels `begin` and `end`."""

    def __init__(self, values: Sequence[float], begin: float, end: float, *, log: bool) -> None:
        self.begin, self.end, self.log = begin, end, log
        if log:
            low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
            self.low, self.high = 10.0**low, 10.0 ** max(high, low + 1)
        else:
            self.low, self.high = 0.0, max(values) * 1.1

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log10(value / self.low) / math.log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1)]
        step = 10 ** math.floor(math.log10(self.high / 2))
        step *= next(factor for factor in (1, 2, 5) if self.high / (step * factor) <= 8)
        return [step * i for i in range(int(self.high / step) + 1)]


class Drawing:
    """Shapes one after another, under a title."""

    def __init__(self, title: str, height: int = HEIGHT) -> None:
        self.parts: list[str] = []
        self.height = height
        self.text(WIDTH / 2, 22, title, anchor="middle", size=14)

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, turned: bool = False
    ) -> None:
        turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{turn}>{escape(words)}</text>'
        )

    def line(self, points: Sequence[Point], colour: str, *, width: float = 1.5) -> None:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}"/>')

    def dot(self, x: float, y: float, colour: str, *, filled: bool = True) -> None:
        fill = colour if filled else "white"
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')

    def axes(self, x: Axis, y: Axis, x_name: str, y_name: str) -> None:
        for value in x.ticks():
            self.line([(x(value), y.begin), (x(value), y.end)], "#dddddd", width=1)
            self.text(x(value), y.begin + LINE, f"{value:.4g}", anchor="middle", size=11)
        for value in y.ticks():
            self.line([(x.begin, y(value)), (x.end, y(value))], "#dddddd", width=1)
            self.text(x.begin - 6, y(value) + 4, f"{value:.4g}", anchor="end", size=11)
        self.line([(x.begin, y.end), (x.begin, y.begin), (x.end, y.begin)], "#444444")
        self.text((x.begin + x.end) / 2, y.begin + 36, x_name, anchor="middle")
        self.text(16, (y.begin + y.end) / 2, y_name, anchor="middle", turned=True)

    def legend(self, names: Sequence[str]) -> None:
        """Names in the order of their colours, in two columns under the frame."""
        for i, name in enumerate(names):
            x, y = LEFT + (i % 2) * (WIDTH - LEFT) / 2, HEIGHT + LINE * (i // 2) + 4
            self.dot(x, y, colour_of(i))
            self.text(x + 10, y + 4, name, size=11)

    def svg(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        begin = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" fill="#222222">'
        ground = f'<rect width="{WIDTH}" height="{self.height}" fill="white"/>'
        return "\n".join([begin, ground, *self.parts, "</svg>\n"])


def colour_of(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def with_legend(entries: int) -> int:
    """Height of a drawing with a frame and a legend."""
    return HEIGHT + LINE * -(-entries // 2) + 10


def roofline(title: str, limits: Mapping[str, Any], works: Sequence[tuple[str, float, float, float | None]]) -> str:
    """Work against what the machine allows.

    works: name, FLOPs a byte, FLOP/s of ours, FLOP/s of the fastest other exact way or None
    """
    drawing = Drawing(title, with_legend(len(works)))
    peak, bandwidth = max(limits["flops_per_s_in"].values()), limits["bytes_per_s"]
    ridge = peak / bandwidth
    rates = [rate for _, _, ours, other in works for rate in (ours, other) if rate]
    x = Axis([ridge, *(intensity for _, intensity, _, _ in works)], LEFT, WIDTH - RIGHT, log=True)
    y = Axis([peak, *rates], HEIGHT - BOTTOM, TOP, log=True)
    drawing.axes(x, y, "FLOPs of the work for each byte that must move", "FLOP/s")
    foot = max(x.low, y.low / bandwidth)
    drawing.line([(x(foot), y(foot * bandwidth)), (x(ridge), y(peak)), (x(x.high), y(peak))], "#444444", width=2)
    for i, (_, intensity, ours, other) in enumerate(works):
        if other is not None:
            drawing.dot(x(intensity), y(other), colour_of(i), filled=False)
        drawing.dot(x(intensity), y(ours), colour_of(i))
        drawing.text(x(intensity) + 6, y(ours) - 5, str(i + 1), size=10)
    drawing.legend([f"{i + 1}  {name}" for i, (name, *_) in enumerate(works)])
    return drawing.svg()


def bars(title: str, groups: Mapping[str, Sequence[tuple[str, float, float, float]]]) -> str:
    """Times of providers side by side, a group for each case.

    groups: case -> provider, median, first and third quartile in seconds
    """
    lines = sum(len(rows) + 1 for rows in groups.values())
    drawing = Drawing(title, TOP + LINE * lines + 20)
    begin, end = 200.0, WIDTH - 120.0
    scale = (end - begin) / max(q3 for rows in groups.values() for *_, q3 in rows)
    providers = list(dict.fromkeys(name for rows in groups.values() for name, *_ in rows))
    top = float(TOP)
    for case, rows in groups.items():
        drawing.text(10, top + 12, case)
        top += LINE
        for name, median, q1, q3 in rows:
            drawing.text(begin - 6, top + 12, name, anchor="end", size=11)
            drawing.bar(begin, top + 2, median * scale, LINE - 4, colour_of(providers.index(name)))
            drawing.line([(begin + q1 * scale, top + 8), (begin + q3 * scale, top + 8)], "#222222")
            drawing.text(begin + q3 * scale + 6, top + 12, f"{1e3 * median:.4g} ms", size=11)
            top += LINE
    return drawing.svg()


def costs(title: str, x_name: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Milliseconds a picture against a size, a line for each provider."""
    drawing = Drawing(title, with_legend(len(series)))
    points = [point for line in series.values() for point in line]
    x = Axis([point[0] for point in points], LEFT, WIDTH - RIGHT, log=False)
    y = Axis([point[1] for point in points], HEIGHT - BOTTOM, TOP, log=False)
    drawing.axes(x, y, x_name, "ms a picture")
    for i, line in enumerate(series.values()):
        drawing.line([(x(a), y(b)) for a, b in line], colour_of(i))
        for a, b in line:
            drawing.dot(x(a), y(b), colour_of(i))
    drawing.legend(list(series))
    return drawing.svg()
