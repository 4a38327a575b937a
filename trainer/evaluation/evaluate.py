"""Evaluates a student on batches of a logit dataset and returns an `EvaluationReport`.

Shape letters: `M` target positions of a batch, `V` ids of the tokenizer.

Every target position counts once, so the results do not depend on batch size or packing, except for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from coldstill.common.progress import tqdm
from coldstill.common.visible import visible
from coldstill.trainer.data.logit_dataset import LogitDataset, Rows, load_logit_dataset
from coldstill.trainer.errors import NonFiniteLogits, NoTargets, TeacherSawAnotherPrompt
from coldstill.trainer.student.forward import innermost
from coldstill.trainer.student.images import images_of
from coldstill.trainer.student.positions import check_lengths
from coldstill.trainer.student.tokenizer import check_model_tokenizer

from .figures import Figures, cache_figures, dense_figures, drawn_by_tail_mass, draws_per_position
from .measured_model import LogitReader, ShardedLogitReader, measuring
from .report import EvaluationReport, EvaluationSums

CHUNK_BYTES = 128 << 20
"""Size of one float32 array `[positions, V]`. Measured: about two exist at once, eleven with a resident teacher."""
OF_TEACHER = "of_teacher"
"""Key of a batch: the same rows as the resident teacher reads them, if it reads images in another way."""


def evaluate_student(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    token_count: int,
    draws: int = 0,
    by_tail_mass: bool = False,
    teacher: Any = None,
    chunk_bytes: int = CHUNK_BYTES,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    sharded: bool = False,
) -> EvaluationReport:
    """Measure `model` at all target positions of the finite `batches`, in evaluation mode and without gradients.

    - `model`: a causal language model of transformers, also wrapped by peft or DDP.
    - `token_count`: ids of the dataset's tokenizer. Further columns of the head are dropped.
    - `draws`: draws per position at capture, as `figures.draws_per_position` returns them; 0 skips the estimates.
    - `by_tail_mass`: whether their number follows the tail's mass, as `figures.drawn_by_tail_mass` returns it.
    - `teacher`: a resident teacher for the dense divergences, on any device; same requirements as `model`.
    - `reduce`: sums a float64 tensor over processes, if each process evaluates its own batches.
    - `sharded`: FSDP2 has sharded `model`. A process without a batch, or whose batch has no target, then runs a token,
      because the others need its part of the weights.

    Raises `NoTargets`, `NonFiniteLogits`.
    """
    sums = EvaluationSums()
    with measuring(model, teacher):
        student = (ShardedLogitReader if sharded else LogitReader)(model, token_count=token_count)
        resident = None if teacher is None else LogitReader(teacher, token_count=token_count)
        for batch in _in_step(batches, student, reduce) if sharded and reduce is not None else batches:
            parts = batch_figures(
                batch, student, resident, draws=draws, by_tail_mass=by_tail_mass, chunk_bytes=chunk_bytes
            )
            for figures in parts:
                sums.add(figures)
        device = student.device
    if reduce is not None:
        sums.tensor = reduce(sums.tensor.to(device)).to(sums.tensor.device)
    if sums.targets == 0:
        raise NoTargets("evaluation", found="no target position in any batch", wanted="at least one")
    return sums.report()


def _in_step(
    batches: Iterable[Mapping[str, Any]], student: Any, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[Mapping[str, Any]]:
    """The batches of this process that have targets; one pass of each process for each of any process."""
    own = iter(batches)
    while True:
        batch = next(own, None)
        if not reduce(torch.tensor(float(batch is not None), device=student.device)):
            return
        if batch is None or batch["targets"].count == 0:
            student.take_part()
        else:
            yield batch


def evaluate_on_dataset(
    model: Any,
    dataset: str | Path,
    *,
    teacher: Any = None,
    batch_size: int = 8,
    rows: Rows = "all",
    tokenizers_are_checked: bool = False,
) -> EvaluationReport:
    """Run `evaluate_student` on all rows of the sealed dataset at this path or URL, with a progress bar.

    `rows`: `without_images` passes over rows that have images. Models that see images are shown them, each by its own
    processor (`images_of`).

    `tokenizers_are_checked`: both models are of `load_measured`; else the tokenizers beside their weights are checked.

    Raises `TokenizerMismatch`, `NoTargets`, `RowTooLong`, `NonFiniteLogits`, `TeacherSawAnotherPrompt`, and what
    `load_logit_dataset` raises.
    """
    logits = load_logit_dataset(str(dataset), rows=rows)
    if teacher is not None and (prompt := logits.header.teacher_prompt):
        raise TeacherSawAnotherPrompt(
            f"{dataset}: teacher_prompt",
            found=f"prompts made by {visible(prompt.kind)}",
            wanted="rows that the teacher saw as they are",
            fix="evaluate without the resident teacher: the figures from the cache are exact",
        )
    for role, given in (("the student", model), ("the resident teacher", teacher)):
        if given is not None:
            if not tokenizers_are_checked:
                check_model_tokenizer(innermost(given), logits.sources.datasets[0], name=role)
            check_lengths(logits, given, name=role)
    total = logits.stream(batch_size=batch_size, seed=0).batches_per_epoch
    batches = batches_of(logits, model, teacher, batch_size=batch_size)
    return evaluate_student(
        model,
        tqdm(batches, desc="evaluating", unit="batch", total=total, disable=None),
        token_count=logits.header.token_count,
        draws=draws_per_position(logits),
        by_tail_mass=drawn_by_tail_mass(logits),
        teacher=teacher,
    )


def batches_of(dataset: LogitDataset, model: Any, teacher: Any = None, *, batch_size: int) -> Iterator[dict[str, Any]]:
    """All rows of `dataset` in stored order, as `model` and a resident `teacher` read them. Raises what a `LogitStream`
    raises."""
    read = [images_of(each) for each in (model, teacher) if each is not None]
    streams = [
        dataset.stream(batch_size=batch_size, seed=0, epochs=1, shuffle=False, images=images)
        for images in (read if any(read) else [None])
    ]
    if len(streams) == 1:
        yield from streams[0]
        return
    for batch, of_teacher in zip(*streams, strict=True):
        yield {**batch, OF_TEACHER: of_teacher}


def batch_figures(
    batch: Mapping[str, Any],
    student: LogitReader,
    teacher: LogitReader | None = None,
    *,
    draws: int = 0,
    by_tail_mass: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Figures]:
    """Figures of the batch's target positions in order, in parts of `chunk_bytes`. Call it inside `measuring`.

    Raises `NonFiniteLogits`.
    """
    targets = batch["targets"].to(student.device)
    if targets.count == 0:
        return
    of_student = student.read(batch, targets)
    as_taught = batch.get(OF_TEACHER, batch)
    of_teacher = None if teacher is None else teacher.read(as_taught, as_taught["targets"])
    size = max(1, chunk_bytes // (4 * student.token_count))
    for start in range(0, targets.count, size):
        part, logits = targets.part(start, start + size), of_student(start, start + size)
        figures = cache_figures(logits, part, draws=draws, by_tail_mass=by_tail_mass)
        if of_teacher is not None:
            figures |= dense_figures(logits, of_teacher(start, start + size).to(student.device), part)
        _check_finite(figures, batch, start)
        yield figures


def sample_names(batch: Mapping[str, Any]) -> list[str]:
    """Sample id of each of the batch's `M` target positions."""
    owners = batch["target_samples"] if "target_samples" in batch else batch["targets"].row
    return [batch["sample_ids"][owner] for owner in owners.tolist()]


def _check_finite(figures: Figures, batch: Mapping[str, Any], start: int) -> None:
    for figure, model in (("cross_entropy", "the student"), ("cached_teacher_kl", "the resident teacher")):
        if figure not in figures or (finite := figures[figure].isfinite()).all():
            continue
        names = sample_names(batch)[start : start + len(finite)]
        rows = sorted({name for name, good in zip(names, finite.tolist(), strict=True) if not good})
        raise NonFiniteLogits(
            f"logits of {model} in rows {', '.join(rows[:8])}"
            + (f" and {len(rows) - 8} more" if len(rows) > 8 else ""),
            found=f"values that are not finite at {int((~finite).sum())} target positions",
            wanted="finite logits",
            fix="inspect these rows; if all rows fail, try dtype float32 or another checkpoint of this model",
        )
