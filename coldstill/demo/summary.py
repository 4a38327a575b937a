"""The demo's last word: what its stages wrote comes in; `summary.json`, a table and one picture go out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .files import new_file, read_json, write_json
from .settings import LOSSES, Layout, Size

if TYPE_CHECKING:
    from rich.console import Console

CAPTURE_KEYS = ("tokens_per_s", "bytes_per_target", "rows", "targets", "rejected", "tokens", "bytes", "wall_s")


def summarise(layout: Layout, size: Size) -> dict[str, Any]:
    """The content of `summary.json`; KL, cross-entropy and entropy in nats per target, on held-out rows."""
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
        "teacher_folder_present_while_training": any(any(read_json(layout.witness(loss)).values()) for loss in LOSSES),
    }


def write_summary(layout: Layout, size: Size) -> None:
    """Write `summary.json` and the picture."""
    from .picture import draw

    summary = summarise(layout, size)
    logs = {loss: read_json(layout.run(loss) / "trainer_state.json")["log_history"] for loss in LOSSES}
    with new_file(layout.picture) as beside:
        draw(summary, logs, beside)
    write_json(layout.summary, summary)


def show(layout: Layout, console: Console, *, wall_s: float) -> None:
    """Print the summary as tables, and where it lies."""
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
    present = "STILL" if summary["teacher_folder_present_while_training"] else "not"
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
        f"Peak memory of each training process; the teacher's folder was {present} there meanwhile.\n"
        f"{layout.card}\n{layout.page}\n{layout.summary}\n{layout.picture}\n"
        f"[dim]{round(wall_s) // 60}:{round(wall_s) % 60:02} minutes[/dim]",
        soft_wrap=True,
    )


def _quality(row: dict[str, float]) -> tuple[str, str, str]:
    return f"{row['kl_teacher_student']:.3f}", f"{row['cross_entropy']:.3f}", f"{row['top1_agreement']:.1%}"
