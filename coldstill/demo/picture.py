"""The demo's picture: the three runs' logs and the summary come in, one PNG goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"cross_entropy": "#8a8f98", "forward_kl": "#2a78b5", "taid": "#d1495b"}
NAMES = {"before": "before", "cross_entropy": "cross-entropy", "forward_kl": "forward KL", "taid": "TAID"}


def draw(summary: Mapping[str, Any], logs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw `training.png`: how far each run was from the cache, TAID's t, and the held-out KL.

    `logs`: per loss the lines of transformers' log, with `step`, `bucket_kl` (nats per target, over the kept ids and
    the tail) and `taid_t`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e8eb",
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlesize": 11,
    }
    with pyplot.rc_context(style):
        figure, (curves, schedule, bars) = pyplot.subplots(
            1, 3, figsize=(13, 4), layout="constrained", width_ratios=[1.5, 1, 1.1]
        )
        _draw_curves(curves, logs)
        _draw_schedule(schedule, logs)
        _draw_bars(bars, summary)
        figure.savefig(path, dpi=150, format="png")
        pyplot.close(figure)


def _draw_curves(axes: Any, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for loss, log in logs.items():
        points = [(line["step"], line["bucket_kl"]) for line in log if "bucket_kl" in line]
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, color=COLOURS[loss], alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(values), color=COLOURS[loss], linewidth=2, label=NAMES[loss])
    axes.set(title="Distance to the teacher while training", xlabel="optimizer step", ylabel="KL on the K+1 view, nats")
    axes.legend(frameon=False)


def _draw_schedule(axes: Any, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    points = [(line["step"], line["taid_t"]) for line in logs["taid"] if "taid_t" in line]
    axes.plot(*zip(*points, strict=True), color=COLOURS["taid"], linewidth=2)
    axes.axhline(1.0, color=COLOURS["forward_kl"], linewidth=1.5, linestyle="--")
    axes.annotate(
        "forward KL: the teacher itself",
        (points[0][0], 1.0),
        (0, 4),
        textcoords="offset points",
        color=COLOURS["forward_kl"],
        fontsize=9,
    )
    axes.set(title="TAID's t", xlabel="optimizer step", ylabel="share of the teacher in the target", ylim=(0, 1.1))


def _draw_bars(axes: Any, summary: Mapping[str, Any]) -> None:
    rows = {"before": summary["student_before"], **summary["students"]}
    values = [row["kl_teacher_student"] for row in rows.values()]
    colours = [COLOURS.get(name, "#c9cdd3") for name in rows]
    drawn = axes.bar(
        [NAMES[name].replace(" ", "\n").replace("-", "-\n") for name in rows], values, color=colours, width=0.65
    )
    axes.bar_label(drawn, fmt="%.3f", padding=3, fontweight="bold")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    axes.set(title="KL(teacher || student), held out", ylabel="nats per target, whole vocabulary")


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over a twentieth of the run, and less at its ends."""
    reach = len(values) // 40
    windows = ((index, min(reach, index, len(values) - 1 - index)) for index in range(len(values)))
    return [sum(values[index - near : index + near + 1]) / (2 * near + 1) for index, near in windows]
