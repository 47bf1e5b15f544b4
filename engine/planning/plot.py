"""How a pre-training scales, as an SVG of its own: GPUs across and pictures a second up, both in powers of two."""

import math
from collections.abc import Sequence
from html import escape

from .choice import Way
from .sweep import BOUND, Row, alone, binds

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 150, 56, 60
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#67635b}.title{font-size:16px;fill:#1c1b19}"
    "line{stroke:#e4e0d7}.ideal{stroke:#9c978d;stroke-dasharray:3 5;fill:none}"
    ".strong{stroke:#c2410c;fill:#c2410c}.weak{stroke:#4a6fa5;fill:#4a6fa5}"
    "polyline{fill:none!important;stroke-width:2}.bound{fill:#fcfbf8;stroke-width:2}"
    "text.strong,text.weak{stroke:none}"
)


def draw(rows: Sequence[Row], title: str) -> str:
    """The sweep as SVG text; the same for the same rows.

    A point is hollow where more than `BOUND` of a step is spent waiting for the network; a number of GPUs that a line
    cannot be run on has no point.
    """
    found = [one for row in rows for one in (row.strong, row.weak) if one is not None]
    first = min(found, key=lambda one: one.gpus)
    rate = alone(first)
    speeds = [one.pictures_per_s for one in found] + [rate * row.gpus for row in rows]
    low = 2.0 ** math.floor(math.log2(min(speeds)))
    high = 2.0 ** math.ceil(math.log2(max(speeds)))
    if high == low:
        high = 2 * low
    most = max(2, rows[-1].gpus)

    def at_x(gpus: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(gpus) / math.log2(most)

    def at_y(speed: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log2(speed / low) / math.log2(high / low)

    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(summary(rows, title))}"><style>{STYLE}</style>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fcfbf8"/>',
        f'<text class="title" x="{LEFT}" y="26">{escape(title)}: pictures a second</text>',
    ]
    doublings = round(math.log2(high / low))
    for step in range(0, doublings + 1, max(1, doublings // 6)):
        speed = low * 2**step
        y = at_y(speed)
        svg.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        svg.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{speed:,.6g}</text>')
    for row in rows:
        svg.append(f'<text x="{at_x(row.gpus):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{row.gpus}</text>')
    svg.append(f'<text x="{LEFT}" y="{HEIGHT - 16}">GPUs; hollow: waits for the network more than {BOUND:.0%}</text>')
    ends = [at_x(row.gpus) for row in (rows[0], rows[-1])]
    heights = [at_y(rate * row.gpus) for row in (rows[0], rows[-1])]
    svg.append(f'<path class="ideal" d="M{ends[0]:.1f} {heights[0]:.1f}L{ends[1]:.1f} {heights[1]:.1f}"/>')

    names = [("weak", "batch grows"), ("strong", "batch of the recipe")]
    labels = [("ideal", "ideal", heights[1])]
    for kind, name in names:
        ways: list[Way] = [one for row in rows if (one := getattr(row, kind)) is not None]
        if not ways:
            continue
        points = [(at_x(one.gpus), at_y(one.pictures_per_s)) for one in ways]
        svg.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        for (x, y), one in zip(points, ways, strict=True):
            hollow = " bound" if binds(one) else ""
            svg.append(f'<circle class="{kind}{hollow}" data-gpus="{one.gpus}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        labels.append((kind, name, points[-1][1]))
    below = -math.inf
    for kind, name, y in sorted(labels, key=lambda label: label[2]):
        below = max(y + 4, below + 17)  # pushed apart where they would overlap
        svg.append(
            f'<text class="{"" if kind == "ideal" else kind}" x="{WIDTH - RIGHT + 12}" y="{below:.1f}">{name}</text>'
        )
    return "\n".join([*svg, "</svg>", ""])


def summary(rows: Sequence[Row], title: str) -> str:
    """What the picture says, for who cannot see it."""
    last = rows[-1]
    parts = [
        f"{name} {one.pictures_per_s:,.0f} pictures/s"
        for name, one in (("batch of the recipe", last.strong), ("batch grows", last.weak))
        if one is not None
    ]
    return f"{title}, on {last.gpus} GPUs: {', '.join(parts)}"
