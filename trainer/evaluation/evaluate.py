"""Measuring a student: a model and batches come in, an `EvaluationReport` goes out. Nothing is changed.

Shape letters: `M` target positions of a batch, `V` ids of the tokenizer.

The same numbers, to rounding, whatever the batches' size and packing: every target position counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from coldstill.trainer.data import load_logit_dataset
from coldstill.trainer.errors import NonFiniteLogits, NoTargets

from .dense import dense_figures
from .figures import Figures, cache_figures
from .report import EvaluationReport, EvaluationSums
from .tail_draws import draws_per_position
from .target_logits import LogitReader

CHUNK_BYTES = 128 << 20
"""Of one float32 array `[positions, V]`; about two of them exist at once, with a resident teacher eleven (measured)."""


def evaluate_student(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    token_count: int,
    draws: int = 0,
    teacher: Any = None,
    chunk_bytes: int = CHUNK_BYTES,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> EvaluationReport:
    """Measure `model` at all target positions of `batches`; they must end.

    `model`: a causal language model of transformers, or what peft or DDP made of one. It is in evaluation mode
    meanwhile, and without gradients.
    `token_count`: ids of the dataset's tokenizer; what the head has beyond them is left out.
    `draws`: how many each position was given at capture, for the estimates (`tail_draws.draws_per_position`); with 0
    there are none.
    `teacher`: a resident teacher for the dense divergences; any device, same requirements as `model`.
    `reduce`: adds up a float64 tensor over processes, where each has batches of its own.

    Raises `NoTargets`, `NonFiniteLogits`.
    """
    sums = EvaluationSums()
    with measuring(model, teacher):
        student = LogitReader(model, token_count=token_count)
        resident = None if teacher is None else LogitReader(teacher, token_count=token_count)
        for batch in batches:
            for figures in batch_figures(batch, student, resident, draws=draws, chunk_bytes=chunk_bytes):
                sums.add(figures)
        device = student.device
    if reduce is not None:
        sums.tensor = reduce(sums.tensor.to(device)).to(sums.tensor.device)
    if sums.targets == 0:
        raise NoTargets("evaluation", found="no target position in any batch", wanted="at least one")
    return sums.report()


def evaluate_on_dataset(
    model: Any, dataset: str | Path, *, teacher: Any = None, batch_size: int = 8
) -> EvaluationReport:
    """`evaluate_student` on all rows of the sealed dataset at this path or URL, with a progress bar.

    Raises `NoTargets`, `NonFiniteLogits`, and what `load_logit_dataset` raises.
    """
    logits = load_logit_dataset(str(dataset))
    stream = logits.stream(batch_size=batch_size, seed=0, epochs=1, shuffle=False)
    return evaluate_student(
        model,
        tqdm(stream, desc="evaluating", unit="batch", total=stream.batches_per_epoch, disable=None),
        token_count=logits.header.token_count,
        draws=draws_per_position(logits),
        teacher=teacher,
    )


def batch_figures(
    batch: Mapping[str, Any],
    student: LogitReader,
    teacher: LogitReader | None = None,
    *,
    draws: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Figures]:
    """Figures of the batch's target positions in order, a part of them at a time. Call it inside `measuring`.

    Raises `NonFiniteLogits`.
    """
    targets = batch["targets"].to(student.device)
    if targets.count == 0:
        return
    of_student = student.read(batch, targets)
    of_teacher = None if teacher is None else teacher.read(batch, targets)
    size = max(1, chunk_bytes // (4 * student.token_count))
    for start in range(0, targets.count, size):
        part, logits = targets.part(start, start + size), of_student(start, start + size)
        figures = cache_figures(logits, part, draws=draws)
        if of_teacher is not None:
            figures |= dense_figures(logits, of_teacher(start, start + size).to(student.device), part)
        _check_finite(figures, batch, start)
        yield figures


@contextmanager
def measuring(*models: Any) -> Iterator[None]:
    """Evaluation mode and no gradients for `models` (None is skipped); after it every part has its own mode again."""
    there = [model for model in models if model is not None]
    modes = [(part, part.training) for model in there for part in model.modules()]
    try:
        for model in there:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def sample_names(batch: Mapping[str, Any]) -> list[str]:
    """Sample id of each of the batch's `M` target positions. In a pack the batch says whose each one is."""
    owners = batch["target_samples"] if "target_samples" in batch else batch["targets"].row
    return [batch["sample_ids"][owner] for owner in owners.tolist()]


def _check_finite(figures: Figures, batch: Mapping[str, Any], start: int) -> None:
    for figure, who in (("cross_entropy", "the student"), ("cached_teacher_kl", "the resident teacher")):
        if figure not in figures or (finite := figures[figure].isfinite()).all():
            continue
        names = sample_names(batch)[start : start + len(finite)]
        rows = sorted({name for name, good in zip(names, finite.tolist(), strict=True) if not good})
        raise NonFiniteLogits(
            f"logits of {who} in rows {', '.join(rows[:8])}" + (f" and {len(rows) - 8} more" if len(rows) > 8 else ""),
            found=f"values that are not finite at {int((~finite).sum())} target positions",
            wanted="finite logits",
            fix="look at these rows; if it is all rows, the weights or the dtype of this model are not usable",
        )
