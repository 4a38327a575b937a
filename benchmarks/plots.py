"""Draws the plots of stored results: NAME as `benchmarks/results/NAME.png`, from the newest `NAME_*_cores.json`.

Points are seeds, bars their means. A plot of unfinished results says how many of the planned runs it shows.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command import new_parser
from benchmarks.common.report import RESULTS, stored

_BAR, _INK, _FLOOR = "#4a7ba6", "#1f2933", "#b4532a"
_LINES = ("#b4532a", "#4a7ba6", "#8a5fa8", "#c9a227", "#5b8c5a", "#1f2933")
_PANELS = (
    ("kl", "KL(teacher || student), nats", "lower is closer to the teacher"),
    ("top1_agreement", "top-1 agreement", "higher is closer to the teacher"),
)


def draw_real_pair(result: dict[str, Any], path: Path) -> None:
    """One row of panels for each student: held-out KL to the teacher and top-1 agreement, by side.

    A student that ended further from the teacher than it began has its figure instead of a bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    students = result["sides"]
    figure = Figure(figsize=(10, 3.4 * len(students)), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(students), len(_PANELS), squeeze=False)
    for row, (student, of_sides) in zip(axes, students.items(), strict=True):
        before = result["before"][student]
        for panel, (name, label, hint) in zip(row, _PANELS, strict=True):
            ranked = sorted(of_sides, key=lambda side: statistics.mean(of_sides[side][name]), reverse=name == "kl")
            # A student that training has destroyed would shrink the bars of all others.
            lost = [side for side in ranked if name == "kl" and min(of_sides[side][name]) > 2 * before[name]]
            for place, side in enumerate(ranked):
                values = of_sides[side][name]
                if side in lost:
                    panel.text(0, place, f" lost: {statistics.mean(values):.1f}", va="center", color=_INK, fontsize=9)
                    continue
                color = _FLOOR if side == "cross-entropy" else _BAR
                panel.barh(place, statistics.mean(values), color=color, height=0.7, alpha=0.75)
                panel.plot(values, [place] * len(values), ".", color=_INK, markersize=5)
            panel.set_yticks(range(len(ranked)), ranked)
            panel.set_ylim(-0.6, len(ranked) - 0.4)
            panel.set_xlabel(f"{label} ({hint})", fontsize=9)
            panel.set_title(f"{student}; before training {before[name]:.2f}")
            panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(result))
    with path.open("wb") as sink:
        canvas.print_png(sink, metadata={"Software": None})


def title(result: dict[str, Any]) -> str:
    """The teacher, and how many of the planned runs there are if some are missing."""
    return f"{result['facts']['teacher']}, test part{_missing(result)}"


def _missing(result: dict[str, Any]) -> str:
    runs = result["runs"]
    return "" if runs["done"] == runs["planned"] else f"; {runs['done']} of {runs['planned']} planned runs"


def draw_capacity(result: dict[str, Any], path: Path) -> None:
    """One panel for each setting: cross-entropy to the text against the teacher's parameters, a line for each loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    facts, students = result["facts"], {name: of for name, of in result["students"].items() if of}
    shown = {name for of_losses in students.values() for found in of_losses.values() for name in found["teachers"]}
    sizes = {name: of["parameters"] / 1e6 for name, of in facts["teachers"].items() if name in shown}
    figure = Figure(figsize=(5.6 * len(students), 4.4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(students), squeeze=False)[0]
    for axes, (setting, of_losses) in zip(panels, students.items(), strict=True):
        for number, (loss, found) in enumerate(of_losses.items()):
            color = _LINES[number % len(_LINES)]
            means = {name: statistics.mean(of["cross_entropy"]) for name, of in found["teachers"].items()}
            if loss == "SFT":
                axes.axhline(next(iter(means.values())), color=_FLOOR, linestyle="--", linewidth=1.2, label=loss)
                continue
            axes.plot(
                [sizes[name] for name in means], list(means.values()), "-o", color=color, markersize=4, label=loss
            )
            for name, of in found["teachers"].items():
                axes.plot([sizes[name]] * len(of["cross_entropy"]), of["cross_entropy"], "_", color=color, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xticks(list(sizes.values()), [f"{name}\n{size:.2g} M" for name, size in sizes.items()])
        axes.minorticks_off()
        axes.set_xlabel(f"parameters of the teacher; the student has {facts['student_parameters'] / 1e6:.2g} M")
        axes.set_ylabel("cross-entropy to held-out text, nats (lower is better)", fontsize=9)
        axes.set_title(setting)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    heading = f"Quality of one student against the size of its teacher, {facts['text']}{_missing(result)}"
    figure.suptitle(heading, fontsize=11)
    with path.open("wb") as sink:
        canvas.print_png(sink, metadata={"Software": None})


_WAYS = {
    "K=16, D=64, iid, kept 32": (16, "iid", "K = 16, independent"),
    "K=4, D=64, systematic, kept 64": (4, "systematic", "K = 4"),
    "K=8, D=64, systematic, kept 64": (8, "systematic", "K = 8, the default"),
    "K=16, D=64, systematic, kept 64": (16, "systematic", "K = 16"),
}
"""Side of the benchmark -> K and way of drawing, by which the bytes are found, and its label."""


def draw_draws(result: dict[str, Any], path: Path) -> None:
    """One panel for each teacher: share of dense TAID's gain against the bytes of a cache with 64 draws, and the lowest
    and highest share of the orders of rows. Bytes and the runs with more targets have results of their own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    found_bytes = json.loads(stored("draws_bytes").read_text(encoding="utf-8"))
    longer = json.loads(stored("draws_300k").read_text(encoding="utf-8"))
    series = (
        ("54,000 targets", result["share_of_dense_gain"], _BAR, -12),
        ("300,000 targets", longer["share_of_dense_gain"], "#5b8c5a", 6),  # its words above, where points meet
    )
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, (teacher, kind) in zip(panels, (("as trained", "flat"), ("sharpened", "sharp")), strict=True):
        sizes = {(line["top_k"], line["draws"]): line["bytes"] for line in found_bytes[kind]}
        for label, shares, color, height in series:
            of_ways = [(way, values) for way, values in shares.get(teacher, {}).items() if way in _WAYS]
            for number, (way, values) in enumerate(of_ways):
                top_k, method, name = _WAYS[way]
                place, mean = sizes[top_k, method], statistics.mean(values)
                spread = [[mean - min(values)], [max(values) - mean]]
                marker = "s" if method == "iid" else "o"
                named = label if number == 0 else None
                axes.errorbar(place, mean, yerr=spread, fmt=marker, color=color, capsize=3, markersize=6, label=named)
                text = axes.annotate(name, (place, mean), (6, height), textcoords="offset points", fontsize=8)
                text.set(color=color, zorder=10, path_effects=[withStroke(linewidth=3, foreground="white")])
        axes.axhline(1, color=_FLOOR, linestyle="--", linewidth=1)
        axes.set_title(f"{kind} teacher; the dashed line is the whole teacher", fontsize=10)
        axes.set_xlabel("bytes per target")
        axes.set_ylabel("share of dense TAID's gain in KL")
        axes.margins(x=0.35, y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    with path.open("wb") as sink:
        canvas.print_png(sink, metadata={"Software": None})


PLOTS = {"real_pair": draw_real_pair, "capacity": draw_capacity, "draws": draw_draws}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the named plots, by default all."""
    parser = new_parser("plots", __doc__, make="plots", takes="seconds", result=None)
    parser.add_argument("names", nargs="*", help=f"results to draw, of {', '.join(PLOTS)}; by default all")
    names = parser.parse_args(arguments).names or list(PLOTS)
    if unknown := sorted(set(names) - set(PLOTS)):
        parser.error(f"no plot of {', '.join(unknown)}; there are {', '.join(PLOTS)}")
    for name in names:
        path = RESULTS / f"{name}.png"
        PLOTS[name](json.loads(stored(name).read_text(encoding="utf-8")), path)
        print(path)


if __name__ == "__main__":
    main()
