"""The summary of a synthetic run has every promised key, a table and a chart."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from coldstill.common.files import read_json, write_json
from coldstill.demo.settings import LOSSES, QUICK, Layout
from coldstill.demo.summary import last_lines, show, write_summary

pytest.importorskip("matplotlib")

STUDENT_KEYS = {"kl_teacher_student", "cross_entropy", "top1_agreement", "targets_per_s", "peak_memory_mb"}
CAPTURE_KEYS = {"tokens_per_s", "bytes_per_target", "rows", "targets", "rejected"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """The files that all stages before the last one write."""
    layout = Layout(tmp_path / "a demo")
    quality = {"parameters": 10, "kl_teacher_student": 0.5, "cross_entropy": 4.0, "top1_agreement": 0.4}
    write_json(
        layout.measurements,
        {
            "targets": 123,
            "teacher": {"parameters": 50, "cross_entropy": 3.5, "entropy": 3.4, "mass_outside_top_k": 0.1},
            "students": dict.fromkeys(("before", *LOSSES), quality),
        },
    )
    capture = {"rows": 9, "targets": 99, "rejected": 1, "tokens": 150, "bytes": 4000, "wall_s": 50.0}
    write_json(layout.capture_summary, {**capture, "tokens_per_s": 3000.0, "bytes_per_target": 40.4})
    for loss in LOSSES:
        taid_t = 1.0 if loss == "taid" else None
        run = {"targets_per_s": 900.0, "peak_memory_mb": 800.0, "steps": 8, "wall_s": 9.0, "taid_t": taid_t}
        write_json(layout.train_summary(loss), run)
        write_json(layout.teacher_presence(loss), {"teacher_before": False, "teacher_after": False})
        lines = [{"step": step, "loss": 1.0, "bucket_kl": 1 / step} for step in range(1, 9)]
        if loss == "taid":
            lines = [{**line, "taid_t": 0.4 + 0.6 * line["step"] / 8} for line in lines]
        write_json(layout.run(loss) / "trainer_state.json", {"log_history": [*lines, {"train_runtime": 9.0}]})
    return layout


def test_the_summary_has_the_promised_keys(layout: Layout) -> None:
    write_summary(layout, QUICK)
    summary = read_json(layout.summary)
    assert set(summary["students"]) == set(LOSSES)
    for student in summary["students"].values():
        assert set(student) >= STUDENT_KEYS
    assert set(summary["capture"]) >= CAPTURE_KEYS
    assert summary["teacher_folder_present_while_training"] is False


def test_the_summary_reports_a_teacher_that_was_present(layout: Layout) -> None:
    write_json(layout.teacher_presence("taid"), {"teacher_before": False, "teacher_after": True})
    write_summary(layout, QUICK)
    assert read_json(layout.summary)["teacher_folder_present_while_training"] is True


def test_the_chart_is_a_png_and_the_table_fits_80_columns(layout: Layout) -> None:
    write_summary(layout, QUICK)
    assert layout.picture.read_bytes().startswith(b"\x89PNG")
    shown = io.StringIO()
    show(layout, Console(file=shown, width=80), wall_s=61.0)
    text = shown.getvalue()
    for part in (*LOSSES, "before", "0.500", "5.0 times smaller", "800 MB", "1:01 minutes", str(layout.summary)):
        assert part in text
    assert "\u2026" not in text


def test_the_command_that_compares_the_runs_works_in_a_folder_with_a_space(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "a new folder")
    for loss in LOSSES:
        layout.run(loss).mkdir(parents=True)
    (line,) = (line for line in last_lines(layout, wall_s=61).splitlines() if "coldstill compare" in line)
    command = line[line.index("coldstill compare") :].replace("coldstill compare", "printf '%s\\n'", 1)
    shown = subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True).stdout.splitlines()
    assert shown == [*(f"{layout.run(loss)}/" for loss in sorted(LOSSES)), "--html", "compare.html"]
