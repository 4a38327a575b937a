"""Collects the stages' results into `summary.json`, a table and the chart `training.png`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldstill.common.files import PAGE_NAME, new_file, read_json, write_json

from .settings import LOSSES, Layout, Size

if TYPE_CHECKING:
    from rich.console import Console

COLORS = {"cross_entropy": "#8a8f98", "forward_kl": "#2a78b5", "taid": "#d1495b"}
NAMES = {"before": "before", "cross_entropy": "cross-entropy", "forward_kl": "forward KL", "taid": "TAID"}

CAPTURE_KEYS = ("tokens_per_s", "bytes_per_target", "rows", "targets", "rejected", "tokens", "bytes", "wall_s")


def summarize(layout: Layout, size: Size) -> dict[str, Any]:
    """The content of `summary.json`. KL, cross-entropy and entropy are in nats per held-out target."""
    measured = read_json(layout.measurements)
    capture = read_json(layout.capture_summary)
    students = {}
    for loss in LOSSES:
        run = read_json(layout.train_summary(loss))
        students[loss] = {
            **measured["students"][loss],
            **{key: run[key] for key in ("targets_per_s", "peak_memory_mb", "steps", "wall_s", "taid_t")},
        }
    return {
        "teacher": measured["teacher"],
        "student_before": measured["students"]["before"],
        "students": students,
        "capture": {**{key: capture[key] for key in CAPTURE_KEYS}, "top_k": size.top_k},
        "held_out_targets": measured["targets"],
        "teacher_folder_present_while_training": any(
            any(read_json(layout.teacher_presence(loss)).values()) for loss in LOSSES
        ),
    }


def write_summary(layout: Layout, size: Size) -> None:
    """Write `summary.json` and `training.png`."""
    summary = summarize(layout, size)
    logs = {loss: read_json(layout.run(loss) / "trainer_state.json")["log_history"] for loss in LOSSES}
    with new_file(layout.picture) as beside:
        draw_chart(summary, logs, beside)
    write_json(layout.summary, summary)


def show(layout: Layout, console: Console, *, wall_s: float) -> None:
    """Print the summary as a table, then the paths of the demo's files."""
    from rich.table import Table

    summary = read_json(layout.summary)
    teacher, before, capture = summary["teacher"], summary["student_before"], summary["capture"]
    ratio = teacher["parameters"] / before["parameters"]
    console.print()
    console.print(
        f"[bold]teacher[/bold]  {teacher['parameters'] / 1e6:.2f} M parameters, "
        f"cross-entropy {teacher['cross_entropy']:.3f}, entropy {teacher['entropy']:.3f}\n"
        f"[bold]student[/bold]  {before['parameters'] / 1e6:.2f} M parameters, {ratio:.1f} times smaller\n"
        f"[bold]dataset[/bold]  {capture['rows']:,} rows, {capture['targets']:,} targets, "
        f"{capture['bytes_per_target']:.0f} bytes per target, {capture['rejected']} rows rejected, "
        f"{capture['tokens_per_s']:,.0f} tokens/s\n",
        soft_wrap=True,
    )
    absence = "PRESENT" if summary["teacher_folder_present_while_training"] else "absent"
    table = Table(title=f"On {summary['held_out_targets']:,} held-out targets", title_justify="left")
    table.add_column("student", no_wrap=True)
    for column in ("KL to\nteacher", "cross-\nentropy", "top-1\nagreement", "targets\nper second", "peak\nmemory"):
        table.add_column(column, justify="right")
    table.add_row("before", *_quality(before), "", "")
    table.add_section()
    for loss, row in summary["students"].items():
        speed = f"{row['targets_per_s']:,.0f}", f"{row['peak_memory_mb']:,.0f} MB"
        table.add_row(loss, *_quality(row), *speed, style=None if loss == "cross_entropy" else "bold green")
    console.print(table)
    console.print(
        "KL(teacher || student) and cross-entropy in nats per target, over the whole vocabulary.\n"
        f"Peak memory of each training process. The teacher's folder was {absence} during training.\n"
        + last_lines(layout, wall_s=wall_s),
        soft_wrap=True,
    )


def last_lines(layout: Layout, *, wall_s: float) -> str:
    """Where the results are, the command that compares the runs, and how long the demo took."""
    runs = shlex.quote(str(layout.run("any").parent))
    return (
        f"{layout.card}\n{layout.page}\n{layout.summary}\n{layout.picture}\n"
        f"Each run has a page, {PAGE_NAME}; side by side: coldstill compare {runs}/*/ --html compare.html\n"
        f"[dim]{round(wall_s) // 60}:{round(wall_s) % 60:02} minutes[/dim]"
    )


def _quality(row: dict[str, float]) -> tuple[str, str, str]:
    return f"{row['kl_teacher_student']:.3f}", f"{row['cross_entropy']:.3f}", f"{row['top1_agreement']:.1%}"


def draw_chart(summary: Mapping[str, Any], logs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw three charts into `path`: each run's distance to the teacher, TAID's t, and the held-out KL.

    `logs` holds the lines of transformers' log for each loss, with `step`, `taid_t` and `bucket_kl` (nats per target,
    over the kept ids and the tail).
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
        axes.plot(steps, values, color=COLORS[loss], alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(values), color=COLORS[loss], linewidth=2, label=NAMES[loss])
    axes.set(
        title="Distance to the teacher while training",
        xlabel="optimizer step",
        ylabel="KL over ids and tail, nats",
    )
    axes.legend(frameon=False)


def _draw_schedule(axes: Any, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    points = [(line["step"], line["taid_t"]) for line in logs["taid"] if "taid_t" in line]
    axes.plot(*zip(*points, strict=True), color=COLORS["taid"], linewidth=2)
    axes.axhline(1.0, color=COLORS["forward_kl"], linewidth=1.5, linestyle="--")
    axes.annotate(
        "forward KL: t = 1",
        (points[0][0], 1.0),
        (0, 4),
        textcoords="offset points",
        color=COLORS["forward_kl"],
        fontsize=9,
    )
    axes.set(title="TAID's t", xlabel="optimizer step", ylabel="teacher's share of the target", ylim=(0, 1.1))


def _draw_bars(axes: Any, summary: Mapping[str, Any]) -> None:
    rows = {"before": summary["student_before"], **summary["students"]}
    values = [row["kl_teacher_student"] for row in rows.values()]
    colors = [COLORS.get(name, "#c9cdd3") for name in rows]
    drawn = axes.bar(
        [NAMES[name].replace(" ", "\n").replace("-", "-\n") for name in rows], values, color=colors, width=0.65
    )
    axes.bar_label(drawn, fmt="%.3f", padding=3, fontweight="bold")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    axes.set(title="KL(teacher || student), held out", ylabel="nats per target, whole vocabulary")


def _smooth(values: Sequence[float]) -> list[float]:
    """Centered moving mean over a twentieth of the run, narrower at both ends."""
    reach = len(values) // 40
    windows = ((index, min(reach, index, len(values) - 1 - index)) for index in range(len(values)))
    return [sum(values[index - near : index + near + 1]) / (2 * near + 1) for index, near in windows]
