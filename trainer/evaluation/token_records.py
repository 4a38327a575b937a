"""Records of single target positions: what student and teacher predicted there.

Shape letters: `M` target positions of a batch.

For inspecting a few rows in the terminal (`cli/evaluate.py`) or as JSON lines. All text in a record is safe to
print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from coldstill.common.models import FrozenModel
from coldstill.common.visible import visible

from .evaluate import OF_TEACHER, sample_names
from .figures import Figures, by_probability, cache_figures, dense_figures
from .measured_model import LogitReader, measuring

TOP = 5
_POSITIONS_AT_ONCE = 64
_MAX_ID = 200
"""Characters of a sample id in each record. A stranger's id can have a megabyte, and a row a million targets."""


class Choice(FrozenModel):
    """One of the most probable tokens of a model, with its text and probability."""

    id: int
    text: str
    prob: float


class TokenRecord(FrozenModel):
    """One target position: the label, and the predictions of teacher and student. Divergences in nats."""

    sample_id: str
    position: int = Field(description="The target position in its row; the label is the token after it.")
    label: int
    text: str = Field(description="The label's text, with invisible characters escaped.")
    student_prob: float = Field(description="The student's probability of the label.")
    teacher_prob: float = Field(description="The teacher's probability of the label.")
    forward_kl_lower_bound: float
    reverse_kl_lower_bound: float
    forward_kl: float | None = Field(default=None, description="Dense; needs a resident teacher.")
    student_top: tuple[Choice, ...] = Field(description=f"The {TOP} most probable tokens.")
    teacher_top: tuple[Choice, ...] = Field(description=f"The {TOP} most probable of the kept tokens.")
    student_tail: float = Field(description="The student's mass outside the kept tokens.")
    teacher_tail: float = Field(description="The teacher's mass outside the kept tokens.")


def token_records(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    token_count: int,
    text: Callable[[int], str],
    teacher: torch.nn.Module | None = None,
) -> Iterator[TokenRecord]:
    """A record for each target position of `batches`, in order; models as for `evaluate_student`.

    `text` returns the printable text of a token id, as `TokenText.label` of the tools does.
    """
    for batch in batches:
        with measuring(model, teacher):
            student = LogitReader(model, token_count=token_count)
            resident = None if teacher is None else LogitReader(teacher, token_count=token_count)
            records = list(_records(batch, student, resident, text))
        yield from records


def write_records(records: Iterable[TokenRecord], path: Path) -> int:
    """Write one JSON document per line, and the file's folder; return the number of records."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.model_dump_json(exclude_none=True) + "\n")
            count += 1
    return count


def _records(
    batch: Mapping[str, Any], student: LogitReader, teacher: LogitReader | None, text: Callable[[int], str]
) -> Iterator[TokenRecord]:
    targets = batch["targets"].to(student.device)
    names = sample_names(batch)
    places = batch["targets"].row, batch["targets"].position
    stored = batch["stored_positions"] if "stored_positions" in batch else batch["position_ids"][places]
    positions = stored.tolist()
    of_student = student.read(batch, targets)
    as_taught = batch.get(OF_TEACHER, batch)
    of_teacher = None if teacher is None else teacher.read(as_taught, as_taught["targets"])
    for start in range(0, targets.count, _POSITIONS_AT_ONCE):
        stop = start + _POSITIONS_AT_ONCE
        part, logits = targets.part(start, stop), of_student(start, stop)
        figures: Figures = cache_figures(logits, part, draws=0)
        if of_teacher is not None:
            figures |= dense_figures(logits, of_teacher(start, stop).to(student.device), part)
        probs, ids = logits.double().softmax(1).topk(min(TOP, logits.shape[1]), dim=1)
        order = by_probability(part)[:, :TOP]
        kept_ids, kept_probs = part.ids.gather(1, order), part.logprobs.gather(1, order).double().exp()
        values = {name: column.tolist() for name, column in figures.items()}
        for n, label in enumerate(part.labels.tolist()):
            yield TokenRecord(
                sample_id=visible(names[start + n][:_MAX_ID]),
                position=positions[start + n],
                label=label,
                text=text(label),
                student_prob=math.exp(-values["cross_entropy"][n]),
                teacher_prob=math.exp(-values["teacher_cross_entropy"][n]),
                forward_kl_lower_bound=values["forward_kl_lower_bound"][n],
                reverse_kl_lower_bound=values["reverse_kl_lower_bound"][n],
                forward_kl=values["forward_kl"][n] if "forward_kl" in values else None,
                student_top=_choices(ids[n], probs[n], text),
                teacher_top=_choices(kept_ids[n], kept_probs[n], text),
                student_tail=values["tail_mass"][n],
                teacher_tail=values["teacher_tail_mass"][n],
            )


def _choices(ids: torch.Tensor, probs: torch.Tensor, text: Callable[[int], str]) -> tuple[Choice, ...]:
    """The tokens with a probability above 0; unused entries have none."""
    both = zip(ids.tolist(), probs.tolist(), strict=True)
    return tuple(Choice(id=token, text=text(token), prob=prob) for token, prob in both if prob > 0)
