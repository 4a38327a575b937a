"""Plot `Stats` as a PNG, 1,200 pixels wide. It shows no text of the dataset."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coldstill.common.packages import require_packages
from coldstill.tools.inspect.page import put_page
from coldstill.tools.stats.histogram import Histogram
from coldstill.tools.stats.measure import Stats
from coldstill.tools.stats.table import bytes_per_target, figure, rank_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _QUIET, _GRID, _MARK = "#1f2933", "#66717d", "#e4e7eb", "#b4532a"
_FILL = "#4a7ba6"
_BARS = 40
"""The approximate number of bars that fit into a panel."""

_LEAST_SHARE = 0.001
"""Columns below this share of the bytes are drawn as one."""


def write_plot(stats: Stats, path: str | Path) -> None:
    """Write the plot to a local file. Raises `PackagesMissing` and `PageNotWritten`."""
    put_page(Path(path), plot_png(stats))


def plot_png(stats: Stats) -> bytes:
    """The plot as PNG bytes. Raises `PackagesMissing`."""
    require_packages("share", "matplotlib")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.color": _INK,
        "axes.labelcolor": _QUIET,
        "axes.edgecolor": _GRID,
        "xtick.color": _QUIET,
        "ytick.color": _QUIET,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "axes.axisbelow": True,
    }
    with rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15, wspace=0.04, hspace=0.04)
        drawing = Figure(figsize=(10, 10.5), dpi=120, facecolor="white", layout=layout)
        canvas = FigureCanvasAgg(drawing)
        panels = drawing.subplots(3, 2)
        _continuous(panels[0, 0], stats.entropy, "Entropy (lower bound)", "nats; kept ids and one bucket for the tail")
        _decades(panels[0, 1], stats.tail_mass, "Tail mass", "probability outside the kept ids")
        kept = f"kept at {100 * (stats.label_kept or 0):.2f}% of the targets"
        shares = {name: 100 * share for name, share in rank_shares(stats).items()}
        _rows(panels[1, 0], shares, "Rank of the label among the kept ids", kept, "share of targets, %")
        _continuous(panels[1, 1], stats.label_logprob, "Log-prob of the label", "nats")
        _lengths(panels[2, 0], stats)
        total = f"{figure(stats.bytes_per_target)} in total; by column of the shards"
        _rows(panels[2, 1], _large_columns(stats), "Bytes per target", total, "bytes")
        sink = io.BytesIO()
        canvas.print_png(sink, metadata={"Software": None})
    return sink.getvalue()


def _continuous(axes: Axes, histogram: Histogram, title: str, unit: str) -> None:
    """Shares of the values on a linear scale that leaves out a thousandth of them at either end."""
    low, high = histogram.quantile(0.001), histogram.quantile(0.999)
    if low is None or high is None:
        return _empty(axes, title)
    width = max((high - low) / _BARS, 1e-9)
    step = max(round(width, 1), 0.05 if width < 0.08 else 0.1)
    low, high = step * np.floor(low / step), step * np.ceil(high / step)
    edges = low + step * np.arange(round((high - low) / step) + 1)
    _bars(axes, histogram, edges, title, unit)
    return None


def _decades(axes: Axes, histogram: Histogram, title: str, unit: str) -> None:
    """Shares of the values on a logarithmic scale, five bars per decade."""
    low = histogram.quantile(0.001)
    if low is None:
        return _empty(axes, title)
    first = int(np.clip(np.floor(np.log10(max(low, 1e-12))), -12, -2))
    axes.set_xscale("log")
    _bars(axes, histogram, 10.0 ** (np.arange(5 * first, 1) / 5), title, unit)
    return None


def _lengths(axes: Axes, stats: Stats) -> None:
    title = "Row lengths"
    top, bottom = stats.row_tokens.quantile(1), stats.row_targets.quantile(0)
    if top is None or bottom is None:
        return _empty(axes, title)
    octaves = np.arange(np.floor(np.log2(max(bottom, 1))) * 3, np.ceil(np.log2(top + 1)) * 3 + 1) / 3
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    for histogram, color in ((stats.row_targets, _FILL), (stats.row_tokens, _INK)):
        shares = 100 * _rebinned(histogram, 2.0**octaves) / histogram.count
        axes.stairs(shares, 2.0**octaves, color=color, fill=color == _FILL, linewidth=1.4)
    note = f"targets (filled): mean {figure(stats.row_targets.mean)}; tokens (line): {figure(stats.row_tokens.mean)}"
    _label(axes, title, note, "per row", "share of rows, %")
    return None


def _bars(axes: Axes, histogram: Histogram, edges: np.ndarray, title: str, unit: str) -> None:
    shares = 100 * _rebinned(histogram, edges) / histogram.count
    axes.stairs(shares, edges, color=_FILL, fill=True)
    mean = histogram.mean
    assert mean is not None
    if edges[0] <= mean <= edges[-1]:
        axes.axvline(mean, color=_MARK, linewidth=1.2)
    note = f"mean {figure(mean)} (line), median {figure(histogram.p50)}"
    _label(axes, title, note, unit, "share of targets, %")


def _rebinned(histogram: Histogram, edges: np.ndarray) -> np.ndarray:
    """`float64 [B]`: the number of values between the edges, with those of a bin spread evenly over it.

    Values below the first edge, or above the last one, are counted in the bin at that end.
    """
    starts, stops, values = (np.array(column, np.float64) for column in zip(*histogram.bins, strict=True))
    covered = (edges[None, :] - starts[:, None]) / (stops - starts)[:, None]
    below = (values[:, None] * covered.clip(0, 1)).sum(0)
    below[0], below[-1] = 0, values.sum()
    return np.diff(below)


def _rows(axes: Axes, values: dict[str, float], title: str, note: str, unit: str) -> None:
    """Horizontal bars, one per name, from the top."""
    if not values:
        return _empty(axes, title)
    places, sizes = np.arange(len(values)), np.array(list(values.values()))
    bars = axes.barh(places, sizes, color=_FILL, height=0.7)
    axes.set_yticks(places, list(values))
    axes.invert_yaxis()
    axes.bar_label(bars, [f"{size:.3g}" for size in sizes], padding=4, fontsize=8.5, color=_QUIET)
    axes.margins(x=0.14)
    _label(axes, title, note, unit, "")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=_GRID)
    return None


def _large_columns(stats: Stats) -> dict[str, float]:
    values = bytes_per_target(stats)
    least = _LEAST_SHARE * sum(values.values())
    small = {name: value for name, value in values.items() if value < least}
    large = {name: value for name, value in values.items() if name not in small}
    return {**large, f"{len(small)} others": sum(small.values())} if small else large


def _label(axes: Axes, title: str, note: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=21)
    axes.text(0, 1.025, note, fontsize=8.5, color=_QUIET, transform=axes.transAxes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(visible=True, axis="y", color=_GRID)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _empty(axes: Axes, title: str) -> None:
    _label(axes, title, "", "", "")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "no data", ha="center", va="center", color=_QUIET, transform=axes.transAxes)
