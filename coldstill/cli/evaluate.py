"""What `coldstill evaluate` does: load the models, measure them, print a table or one JSON document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.tools.inspect.token_text import TokenText
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.evaluation.evaluate import evaluate_on_dataset
from coldstill.trainer.evaluation.lm_eval_tasks import evaluate_tasks, require_tasks
from coldstill.trainer.evaluation.measured_model import Weights, load_measured
from coldstill.trainer.evaluation.per_token import token_records, write_records
from coldstill.trainer.evaluation.rouge import require_rouge, rouge_l

from .output import show_result, show_warning
from .per_token_table import show_records

ANOTHER_TEACHER_NATS = 0.05
"""Above this KL the resident teacher is another model than the dataset's: storage costs at most 1e-4 nats."""


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
    found |= _metrics(model, resident, root, batch_size)
    if rouge:
        found["rougeL"] = rouge_l(model, _tokenizer(student), dataset, rows=rouge, batch_size=batch_size)
    if tasks:
        found |= evaluate_tasks(model, _tokenizer(student), tasks, batch_size=batch_size)
    if as_json:
        print(json.dumps(found))
    else:
        found.pop("calibration")
        show_result(found, title="evaluation")
    if per_token:
        _show_tokens(model, resident, dataset, root, rows=per_token, file=records, quiet=as_json)


def _metrics(model: Any, teacher: Any, root: str, batch_size: int) -> dict[str, Any]:
    report = evaluate_on_dataset(model, root, teacher=teacher, batch_size=batch_size)
    if report.cached_teacher_kl is not None and report.cached_teacher_kl > ANOTHER_TEACHER_NATS:
        show_warning(
            f"the resident teacher is not the one of the dataset: the KL between them is at least "
            f"{report.cached_teacher_kl:.2g} nats. forward kl, reverse kl and last fifth mass compare the student with "
            "the resident teacher."
        )
    return {**report.metrics(), "calibration": [one.model_dump() for one in report.calibration]}


def _show_tokens(
    model: Any, teacher: Any, dataset: Dataset, root: str, *, rows: int, file: Path | None, quiet: bool
) -> None:
    stream = load_logit_dataset(root).stream(batch_size=1, seed=0, epochs=1, shuffle=False)
    found = token_records(
        model,
        islice(stream, rows),
        token_count=dataset.header.token_count,
        text=TokenText(dataset).label,
        teacher=teacher,
    )
    if file is not None:
        write_records(found, file)
    elif not quiet:
        show_records(found, console=Console())


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
