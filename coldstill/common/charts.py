"""Line charts as SVG text for pages without scripts: one y axis per chart, with its unit in the title.

Colors come from the classes `line-0` to `line-7` of the page's style. All text passes `escaped`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .page import escaped

WIDTH, HEIGHT = 400, 210
"""Units of the drawing. A column of the page is about as wide in pixels, so that text keeps its size."""
COLORS = 8
"""Number of classes `line-0`, `line-1`, ...; further lines take them again, dashed."""
MOST_POINTS = 300
"""Points of a line; a longer one is drawn by the means of as many parts."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 24
_SMOOTH_FROM = 24
"""A shorter line has no moving mean."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named line. `points`: x and y in the order of x. `color`: number of its class."""

    name: str
    points: Sequence[Point]
    color: int = 0
    dots: bool = False
    """Whether each point is marked, for a few measurements."""
    noisy: bool = False
    """Whether a line of many points is drawn faint, below its moving mean."""


@dataclass(frozen=True)
class Chart:
    """A chart. `unit`: of the y axis. `low`, `high`: ends of the axis that the values may only widen."""

    title: str
    unit: str
    lines: Sequence[Line]
    low: float | None = None
    high: float | None = None
    note: str = ""
    marks: Sequence[float] = field(default=())
    """x of dashed vertical lines."""


def chart_figure(chart: Chart, *, x_name: str, x_end: float) -> str:
    """The chart as a `<figure>`: title, unit, last value of a single line, drawing. `x_end`: the right end."""
    points = [point for line in chart.lines for point in finite(line.points)]
    last = ""
    if len(chart.lines) == 1 and points:
        last = f"<b>{figure(points[-1][1])}</b>"
    note = f'<p class="quiet note">{escaped(chart.note)}</p>' if chart.note else ""
    drawing = _drawing(chart, points, x_name=x_name, x_end=x_end) if points else '<p class="quiet">No values yet.</p>'
    return (
        f'<figure class="chart"><figcaption><h3>{escaped(chart.title)}</h3>'
        f'<span class="quiet">{escaped(chart.unit)}</span>{last}</figcaption>{drawing}{note}</figure>'
    )


def finite(points: Sequence[Point]) -> list[Point]:
    """The points whose x and y are finite."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points, each the mean of neighbors; the last point stays."""
    if len(points) <= most:
        return list(points)
    edges = [round(part * (len(points) - 1) / (most - 1)) for part in range(most)]
    parts = [points[start:stop] for start, stop in pairwise(edges)]
    return [*((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts), points[-1]]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Centered moving mean over a twelfth of the line, narrower at both ends."""
    reach, last = len(points) // 24, len(points) - 1
    found = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, last - index)
        window = points[index - near : index + near + 1]
        found.append((x, sum(y for _, y in window) / len(window)))
    return found


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, at most `most` + 1 steps apart by 1, 2 or 5 times a power
    of 10."""
    largest = max(abs(low), abs(high))
    span = high - low
    if span <= 1e-9 * largest or span < 1e-100:  # as good as one value
        span = largest if largest >= 1e-100 else 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def figure(value: float) -> str:
    """Four significant digits, with a separator of thousands; very small and very large numbers by their exponent."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size == 0:
        return "0"
    if size < 1e-4 or size >= 1e7:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        if not exponent:
            mantissa, _, exponent = f"{value:.2e}".partition("e")
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _tick_text(value: float, step: float) -> str:
    size = abs(value)
    if size < step / 2:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    return figure(float(f"{value:.3g}")) if size < 1000 else f"{value:,.0f}"


def _drawing(chart: Chart, points: Sequence[Point], *, x_name: str, x_end: float) -> str:
    ys = [y for _, y in points]
    low, high = min(ys), max(ys)
    low = low if chart.low is None else min(low, chart.low)
    high = high if chart.high is None else max(high, chart.high)
    y_ticks = ticks(low, high, 4)
    x_ticks = [tick for tick in ticks(0, x_end, 5) if tick <= x_end * 1.001]
    bottom, top = y_ticks[0], y_ticks[-1]
    right, base = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def across(x: float) -> str:
        return f"{_LEFT + (right - _LEFT) * x / (x_end or 1):.1f}"

    def up(y: float) -> str:
        return f"{base - (base - _TOP) * (y - bottom) / (top - bottom):.1f}"

    parts = []
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {up(tick)}H{right}"/>')
        text = _tick_text(tick, y_ticks[1] - y_ticks[0])
        parts.append(f'<text x="{_LEFT - 6}" y="{up(tick)}" dy=".32em" text-anchor="end">{text}</text>')
    for tick in x_ticks:
        anchor = "end" if float(across(tick)) > right - 12 else "middle"
        text = _tick_text(tick, x_ticks[1] if len(x_ticks) > 1 else 1)
        parts.append(f'<text x="{across(tick)}" y="{HEIGHT - 7}" text-anchor="{anchor}">{text}</text>')
    parts += [f'<path class="mark" d="M{across(mark)} {_TOP}V{base}"/>' for mark in chart.marks]
    for line in chart.lines:
        parts.append(_drawn(line, across, up))
    said = f"{chart.title}, {chart.unit}, by {x_name}: from {figure(ys[0])} to {figure(ys[-1])}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(said)}">{"".join(parts)}</svg>'


def _drawn(line: Line, across: Callable[[float], str], up: Callable[[float], str]) -> str:
    points = thinned(finite(line.points))
    if not points:
        return ""
    kind = f"line-{line.color % COLORS}" + (" dashed" if line.color >= COLORS else "")

    def path(of: Sequence[Point]) -> str:
        return "M" + "L".join(f"{across(x)} {up(y)}" for x, y in of)

    name = f"<title>{escaped(line.name)}</title>"
    if line.noisy and len(points) >= _SMOOTH_FROM:
        faint = f'<path class="line faint {kind}" d="{path(points)}"/>'
        return f'<g>{name}{faint}<path class="line {kind}" d="{path(smoothed(points))}"/></g>'
    dots = points if line.dots or len(points) == 1 else []
    circles = "".join(f'<circle class="dot {kind}" cx="{across(x)}" cy="{up(y)}" r="2.6"/>' for x, y in dots)
    return f'<g>{name}<path class="line {kind}" d="{path(points)}"/>{circles}</g>'
