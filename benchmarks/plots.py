"""Draws the plot of a stored result: `python -m benchmarks.plots real_pair` writes `benchmarks/results/real_pair.png`.

Points are seeds, bars their means. A plot of unfinished results says how many of the planned runs it shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

_BAR, _INK, _FLOOR = "#4a7ba6", "#1f2933", "#b4532a"
_PANELS = (
    ("kl", "KL(teacher || student), nats", "lower is closer to the teacher"),
    ("top1_agreement", "top-1 agreement", "higher is closer to the teacher"),
)


def draw_real_pair(result: dict[str, Any], path: Path) -> None:
    """One row of panels for each student: held-out KL to the teacher and top-1 agreement, by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    students = result["sides"]
    figure = Figure(figsize=(10, 3.4 * len(students)), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(students), len(_PANELS), squeeze=False)
    for row, (layers, of_sides) in zip(axes, students.items(), strict=True):
        for panel, (name, label, hint) in zip(row, _PANELS, strict=True):
            ranked = sorted(of_sides, key=lambda side: statistics.mean(of_sides[side][name]), reverse=name == "kl")
            for place, side in enumerate(ranked):
                values = of_sides[side][name]
                color = _FLOOR if side == "cross-entropy" else _BAR
                panel.barh(place, statistics.mean(values), color=color, height=0.7, alpha=0.75)
                panel.plot(values, [place] * len(values), ".", color=_INK, markersize=5)
            panel.set_yticks(range(len(ranked)), ranked)
            panel.set_xlabel(f"{label} ({hint})", fontsize=9)
            panel.set_title(f"student with {layers} layers; before training {result['before'][layers][name]:.2f}")
            panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(result))
    with path.open("wb") as sink:
        canvas.print_png(sink, metadata={"Software": None})


def title(result: dict[str, Any]) -> str:
    """The teacher, and how many of the planned runs there are if some are missing."""
    runs = result["runs"]
    missing = "" if runs["done"] == runs["planned"] else f"; {runs['done']} of {runs['planned']} planned runs"
    return f"{result['facts']['teacher']}, test part{missing}"


PLOTS = {"real_pair": draw_real_pair}


def stored(name: str) -> Path:
    """The newest stored result of this name. Raises `FileNotFoundError`."""
    found = sorted(RESULTS.glob(f"{name}_*_cores.json"), key=lambda path: json.loads(path.read_text())["date"])
    if not found:
        raise FileNotFoundError(f"no {name}_*_cores.json in {RESULTS}: run the benchmark first")
    return found[-1]


def main() -> None:
    """Draw the named plots, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"results to draw, of {', '.join(PLOTS)}; by default all")
    names = parser.parse_args().names or list(PLOTS)
    if unknown := sorted(set(names) - set(PLOTS)):
        parser.error(f"no plot of {', '.join(unknown)}; there are {', '.join(PLOTS)}")
    for name in names:
        path = RESULTS / f"{name}.png"
        PLOTS[name](json.loads(stored(name).read_text(encoding="utf-8")), path)
        print(path)


if __name__ == "__main__":
    main()
