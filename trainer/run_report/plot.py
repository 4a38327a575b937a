"""The curves of several runs as a PNG, 1,200 pixels wide."""

from __future__ import annotations

import io
from typing import Any

from coldstill.common.charts import smoothed, thinned
from coldstill.common.packages import require_packages
from coldstill.common.visible import visible

from .compare import Comparison
from .page import LOGGED, NOISY

_COLORS = ("#2a6fb0", "#c9542a", "#14735c", "#a1378a", "#94700a", "#6450c4", "#7d5a3c", "#4f5a63")
_MAX_NAME = 60


def comparison_png(comparison: Comparison) -> bytes:
    """The plot as PNG bytes. Raises `PackagesMissing`."""
    require_packages("share", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = comparison.runs
    shown = [chart for chart in LOGGED if any(record.points(chart[1]) for record in runs.values())]
    rows = (len(shown) + 1) // 2
    drawing = Figure(figsize=(10, 2.6 * max(rows, 1) + 0.5), dpi=120, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(drawing)
    handles: dict[str, Any] = {}
    for place, (title, key, unit, low, _) in enumerate(shown):
        axes = drawing.add_subplot(rows, 2, place + 1)
        for number, (name, record) in enumerate(runs.items()):
            points = thinned(record.points(key))
            if not points:
                continue
            style: dict[str, Any] = {
                "color": _COLORS[number % len(_COLORS)],
                "linestyle": "-" if number < len(_COLORS) else "--",
            }
            means = points
            if key in NOISY:
                means = smoothed(points)
                axes.plot(*zip(*points, strict=True), alpha=0.3, linewidth=1, **style)
            (handles[name],) = axes.plot(*zip(*means, strict=True), linewidth=1.8, **style)
        axes.set_title(f"{title}, {unit}" if unit else title, loc="left", fontsize=10)
        axes.tick_params(labelsize=8.5, length=0)
        axes.grid(visible=True, color="#e4e7eb")
        axes.spines[["top", "right", "left"]].set_visible(False)
        if low is not None:
            axes.set_ylim(bottom=low)
    if handles:
        names = map(_plain, handles)
        drawing.legend(handles.values(), names, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    sink = io.BytesIO()
    canvas.print_png(sink, metadata={"Software": None})
    return sink.getvalue()


def _plain(name: str) -> str:
    """The name of a folder, of a long one start and end, without marks by which matplotlib reads formulas or hides a
    line."""
    text = visible(name)
    if len(text) > _MAX_NAME:
        text = f"{text[: _MAX_NAME // 2]}…{text[-(_MAX_NAME // 2) :]}"
    return text.replace("$", r"\$") if text[:1] != "_" else " " + text.replace("$", r"\$")
