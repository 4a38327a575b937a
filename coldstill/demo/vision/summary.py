"""Collects the vision demo's results into `summary.json`, a table and the picture `answers.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coldstill.common.files import new_file, read_json, write_json
from coldstill.demo.settings import LOSSES
from coldstill.demo.summary import CAPTURE_KEYS, COLORS, NAMES, last_lines

from .scenes import KINDS
from .settings import Layout, Size

if TYPE_CHECKING:
    from rich.console import Console

RUN_KEYS = ("targets_per_s", "peak_memory_mb", "steps", "wall_s", "taid_t")
EXAMPLES = 10
"""Questions in the picture: about equally many of each kind."""
SHORT = {"before": "before", "cross_entropy": "CE", "forward_kl": "FKL", "taid": "TAID"}
RIGHT, WRONG = "#1a7f37", "#c62828"


def summarize(layout: Layout, size: Size) -> dict[str, Any]:
    """The content of `summary.json`. KL is in nats per held-out target."""
    measured = read_json(layout.measurements)
    capture = read_json(layout.capture_summary)
    students = {}
    for loss in LOSSES:
        run = read_json(layout.train_summary(loss))
        students[loss] = {**measured["students"][loss], **{key: run[key] for key in RUN_KEYS}}
    return {
        "teacher": measured["teacher"],
        "student_before": measured["students"]["before"],
        "students": students,
        "image_tokens": measured["image_tokens"],
        "capture": {**{key: capture[key] for key in CAPTURE_KEYS}, "top_k": size.top_k},
        "held_out_questions": measured["questions"],
        "held_out_targets": measured["targets"],
        "teacher_folder_present_while_training": any(
            any(read_json(layout.teacher_presence(loss)).values()) for loss in LOSSES
        ),
    }


def write_summary(layout: Layout, size: Size) -> None:
    """Write `summary.json` and `answers.png`."""
    summary = summarize(layout, size)
    answers = read_json(layout.answers)["rows"]
    with new_file(layout.picture) as beside:
        draw_picture(summary, examples(answers), layout, beside)
    write_json(layout.summary, summary)


def show(layout: Layout, console: Console, *, wall_s: float) -> None:
    """Print the summary as two tables, then the paths of the demo's files."""
    summary = read_json(layout.summary)
    teacher, before, capture = summary["teacher"], summary["student_before"], summary["capture"]
    ratio = teacher["parameters"] / before["parameters"]
    tokens = summary["image_tokens"]
    console.print()
    console.print(
        f"[bold]teacher[/bold]  {teacher['parameters'] / 1e6:.2f} M parameters, an image is {tokens['teacher']} "
        f"tokens, {teacher['accuracy']:.1%} right answers\n"
        f"[bold]student[/bold]  {before['parameters'] / 1e6:.2f} M parameters, {ratio:.1f} times smaller, an image is "
        f"{tokens['before']} tokens\n"
        f"[bold]dataset[/bold]  {capture['rows']:,} rows, {capture['targets']:,} targets, {capture['rejected']} rows "
        f"rejected, {capture['tokens_per_s']:,.0f} tokens/s\n",
        soft_wrap=True,
    )
    console.print(_table(summary))
    absence = "PRESENT" if summary["teacher_folder_present_while_training"] else "absent"
    console.print(
        "CE cross-entropy, FKL forward KL. KL in nats per target, over the whole vocabulary.\n"
        f"The teacher's folder was {absence} during training.\n" + last_lines(layout, wall_s=wall_s),
        soft_wrap=True,
    )


def _table(summary: Mapping[str, Any]) -> Any:
    from rich.table import Table

    questions = summary["held_out_questions"]
    students = {"before": summary["student_before"], **summary["students"]}
    title = f"On {sum(questions.values()):,} held-out questions: right answers, and KL to the teacher"
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("question", no_wrap=True)
    table.add_column("teacher", justify="right")
    for name in (*students, *students):
        table.add_column(
            SHORT[name], justify="right", style=None if name in ("before", "cross_entropy") else "bold green"
        )

    def add(name: str, accuracy: Any, kl: Any) -> None:
        right = [f"{accuracy(row):.0%}" for row in (summary["teacher"], *students.values())]
        table.add_row(name, *right, *(f"{kl(row):.3f}" for row in students.values()))

    add("all", lambda row: row["accuracy"], lambda row: row["kl_teacher_student"])
    table.add_section()
    for kind in (kind for kind in KINDS if kind in questions):
        add(kind, lambda row: row["accuracy_by_kind"][kind], lambda row: row["kl_by_kind"][kind])  # noqa: B023
    return table


def examples(answers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`EXAMPLES` rows with an image: each kind in turn, those on which the students differ first."""

    def agreement(row: Mapping[str, Any]) -> int:
        return len({answer for name, answer in row["answers"].items() if name in LOSSES}) == 1

    chosen: list[Mapping[str, Any]] = []
    by_kind = {
        kind: sorted((row for row in answers if row["kind"] == kind and row["images"]), key=agreement) for kind in KINDS
    }
    while len(chosen) < EXAMPLES and any(by_kind.values()):
        chosen += [rows.pop(0) for rows in by_kind.values() if rows]
    return chosen[:EXAMPLES]


def draw_picture(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], layout: Layout, path: Any) -> None:
    """Draw into `path`: right answers by kind of question, then images with the question and each model's answer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    columns = 5
    with pyplot.rc_context(style):
        figure: Any = pyplot.figure(figsize=(15, 12), layout="constrained")
        bars, grid = figure.subfigures(2, 1, height_ratios=[1, 2.6])
        _draw_bars(bars.subplots(), summary)
        lines = -(-len(rows) // columns)
        cells = grid.subplots(2 * lines, columns, squeeze=False, height_ratios=[1, 0.4] * lines)
        for axes in cells.flat:
            axes.axis("off")
        for number, row in enumerate(rows):
            line, column = divmod(number, columns)
            _draw_example(cells[2 * line, column], cells[2 * line + 1, column], row, layout)
        figure.savefig(path, dpi=110, format="png")
        pyplot.close(figure)


def _draw_bars(axes: Any, summary: Mapping[str, Any]) -> None:
    models = {"teacher": summary["teacher"], "before": summary["student_before"], **summary["students"]}
    kinds = [kind for kind in KINDS if kind in summary["held_out_questions"]]
    width = 0.8 / len(models)
    for number, (name, row) in enumerate(models.items()):
        places = [place + (number - (len(models) - 1) / 2) * width for place in range(1 + len(kinds))]
        values = [row["accuracy"], *(row["accuracy_by_kind"][kind] for kind in kinds)]
        color = {"teacher": "#1b1f24", "before": "#d5d9de"}.get(name) or COLORS[name]
        axes.bar(places, [100 * value for value in values], width, color=color, label=NAMES.get(name, name))
    axes.set_xticks(range(1 + len(kinds)), ["all", *kinds])
    axes.set(ylabel="right answers, %", ylim=(0, 105))
    axes.set_title("Right answers to held-out questions, by kind", loc="left", fontweight="bold")
    axes.grid(axis="y", color="#e6e8eb")
    axes.legend(frameon=False, ncols=len(models), loc="upper right", bbox_to_anchor=(1, 1.16))


def _draw_example(axes: Any, below: Any, row: Mapping[str, Any], layout: Layout) -> None:
    """One question: its images side by side, then the answers, green if they are right."""
    import numpy as np
    from PIL import Image

    from .scenes import answer_content

    shown = [np.asarray(Image.open(layout.text / path).convert("RGB")) for path in row["images"]]
    gap = np.full((shown[0].shape[0], 4, 3), 255, np.uint8)
    image = np.concatenate([part for one in shown for part in (one, gap)][:-1], axis=1)
    axes.imshow(image, interpolation="nearest")
    axes.set_anchor("S")
    axes.set_title(row["question"], fontsize=10, fontweight="bold")
    names = {"teacher": "teacher", **{loss: NAMES[loss] for loss in LOSSES}}
    for number, (name, title) in enumerate(names.items()):
        answer = row["answers"][name]
        color = RIGHT if answer_content(answer) == row["content"] else WRONG
        shown_answer = f"{title}: {answer[:56]}"
        size = 8.5 if len(shown_answer) <= 44 else 6.5
        # Outside the layout, so that a long answer makes no column wider than the others.
        below.text(0, 1 - 0.25 * number, shown_answer, color=color, fontsize=size, va="top").set_in_layout(False)
