"""What `coldstill evaluate` does: load the models, measure them, print a table or one JSON document.

Token-by-token records are printed as one table per dataset row. The text in `TokenRecord`s is escaped already, and none
of it is parsed as markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.tools.inspect.terminal import percent, style_of
from coldstill.tools.inspect.token_text import TokenText
from coldstill.trainer.data.logit_dataset import Rows, load_logit_dataset
from coldstill.trainer.evaluation.evaluate import batches_of, evaluate_on_dataset
from coldstill.trainer.evaluation.lm_eval_tasks import evaluate_tasks, require_tasks
from coldstill.trainer.evaluation.measured_model import Weights, load_measured
from coldstill.trainer.evaluation.rouge import require_rouge, rouge_l
from coldstill.trainer.evaluation.token_records import TOP, Choice, TokenRecord, token_records, write_records
from coldstill.trainer.student.tokenizer import load_tokenizer

from .output import json_text, show_result, show_warning, stdout_console

ANOTHER_TEACHER_NATS = 0.05
"""Above this KL, in nats, the resident teacher is not the dataset's teacher: storage costs at most 1e-4."""

_CHOICE_WIDTH = 12
_ROWS_AT_ONCE = 256


def evaluate(
    student: str,
    root: str,
    *,
    teacher: str | None = None,
    rouge: int = 0,
    tasks: Sequence[str] = (),
    per_token: int = 0,
    records: Path | None = None,
    batch_size: int = 8,
    dataset_rows: Rows = "all",
    dtype: Weights = "float32",
    as_json: bool = False,
) -> None:
    """Measure the model `student` on the dataset at `root` and print the metrics; `coldstill evaluate --help` lists
    the options.

    With `as_json`, standard output holds one JSON document and nothing else. With `records`, the rows of `per_token`
    are written to that file as JSON lines and not printed.

    Raises `PackagesMissing`, before anything is loaded; `NoTargets`, `NonFiniteLogits`, `NoAnswers`, `TaskFailed`, and
    what `load_logit_dataset` and `load_measured` raise.
    """
    if rouge:
        require_rouge()
    if tasks:
        require_tasks()
    dataset = open_dataset(root)
    model = load_measured(student, dataset, role="student", weights=dtype)
    resident = None if teacher is None else load_measured(teacher, dataset, role="resident teacher", weights=dtype)

    name = teacher or dataset.header.teacher.name
    found: dict[str, Any] = {"student": student, "dataset_id": dataset.dataset_id, "teacher": name}
    found |= _metrics(model, resident, root, batch_size, dataset_rows)
    if rouge:
        found["rougeL"] = rouge_l(
            model,
            load_tokenizer(student),
            dataset,
            rows=rouge,
            batch_size=batch_size,
            without_images=dataset_rows == "without_images",
        )
    if tasks:
        found |= evaluate_tasks(model, load_tokenizer(student), tasks, batch_size=batch_size)
    if as_json:
        print(json_text(found))
    else:
        found.pop("calibration")
        show_result(found, title="evaluation")
    if per_token:
        logits = load_logit_dataset(root, rows=dataset_rows)
        batches = islice(batches_of(logits, model, resident, batch_size=1), per_token)
        _show_tokens(model, resident, dataset, batches, file=records, quiet=as_json)


def _metrics(model: Any, teacher: Any, root: str, batch_size: int, rows: Rows) -> dict[str, Any]:
    report = evaluate_on_dataset(
        model, root, teacher=teacher, batch_size=batch_size, rows=rows, tokenizers_are_checked=True
    )
    if report.cached_teacher_kl is not None and report.cached_teacher_kl > ANOTHER_TEACHER_NATS:
        show_warning(
            f"the resident teacher is not the dataset's teacher: the KL between them is at least "
            f"{report.cached_teacher_kl:.2g} nats. forward kl, reverse kl and last fifth mass compare the student with "
            "the resident teacher."
        )
    return {**report.metrics(), "calibration": [one.model_dump() for one in report.calibration]}


def _show_tokens(
    model: Any, teacher: Any, dataset: Dataset, batches: Iterable[Any], *, file: Path | None, quiet: bool
) -> None:
    found = token_records(
        model,
        batches,
        token_count=dataset.header.token_count,
        text=TokenText(dataset).label,
        teacher=teacher,
    )
    if file is not None:
        write_records(found, file)
    elif not quiet:
        show_records(found, console=stdout_console())


def show_records(records: Iterable[TokenRecord], *, console: Console) -> None:
    """Print one table per dataset row; a long row is printed in blocks of `_ROWS_AT_ONCE` tokens."""
    for sample_id, group in groupby(records, key=lambda record: record.sample_id):
        of_row = list(group)
        console.print(_title(sample_id, of_row))
        for start in range(0, len(of_row), _ROWS_AT_ONCE):
            console.print(_table(of_row[start : start + _ROWS_AT_ONCE], header=start == 0, width=console.width))


def _title(sample_id: str, records: Sequence[TokenRecord]) -> Text:
    dense = [record.forward_kl for record in records if record.forward_kl is not None]
    bound = sum(record.forward_kl_lower_bound for record in records) / len(records)
    line = f"  {len(records):,} targets · KL to the teacher ≥ {bound:.3f} nats"
    if dense:
        line += f", dense {sum(dense) / len(dense):.3f}"
    return Text(sample_id, style="bold").append(line, style="dim not bold")


def _table(records: Sequence[TokenRecord], *, header: bool, width: int) -> Table:
    numbers = max(5, len(str(records[-1].position + 1)))
    token_width = 10 if width < 100 else 20
    left = width - (numbers + token_width + 3 * 5 + 5)
    choices = min(max(left // _CHOICE_WIDTH, 1), TOP)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=header, header_style="dim")
    table.add_column("token", justify="right", style="dim", width=numbers)
    table.add_column("", width=token_width, no_wrap=True)
    table.add_column("stud.", justify="right", width=5)
    table.add_column("teach", justify="right", width=5)
    table.add_column("KL ≥", justify="right", width=5)
    table.add_column("top of student over teacher, ✓ label", width=choices * _CHOICE_WIDTH, no_wrap=True)
    for record in records:
        tops = [_entries(top[:choices], record.label) for top in (record.student_top, record.teacher_top)]
        table.add_row(
            Text(str(record.position + 1)),
            Text(_cut(record.text, token_width), style=style_of(record.student_prob)),
            Text(percent(record.student_prob)),
            Text(percent(record.teacher_prob)),
            Text(f"{record.forward_kl_lower_bound:.2f}"),
            Text("\n").join(tops),
        )
    return table


def _entries(choices: Sequence[Choice], label: int) -> Text:
    line = Text()
    for choice in choices:
        mark, style = ("✓", "bold") if choice.id == label else (" ", "")
        line.append(f"{percent(choice.prob):>4}", style=style or "dim")
        line.append(set_cell_size(f"{mark}{_cut(choice.text, _CHOICE_WIDTH - 6)}", _CHOICE_WIDTH - 4), style=style)
    return line


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"
