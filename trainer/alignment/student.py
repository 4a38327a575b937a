"""What training does for a student whose tokenizer is not the dataset's: checks, batches, objective, counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers.utils import logging

from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.tokenizer import fingerprint_bytes
from coldstill.trainer.config import OtherTokenizerConfig
from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.errors import OtherTokenizerUnsupported
from coldstill.trainer.losses.base import Loss, build_objective, state_of
from coldstill.trainer.losses.cross_entropy import CrossEntropy
from coldstill.trainer.student.tokenizer import StudentTokenizer

from .chat_turns import ChatTurns
from .collator import AlignedCollator, collator_of, sampled
from .evaluation import evaluate_text
from .objective import AlignedObjective
from .token_bytes import TokenBytes

logger = logging.get_logger(__name__)

_MOST_NAMED = 20
"""Skipped rows of a run that are logged by name."""


class AlignedStudent:
    """`header`: the training dataset's, with the ids of the student's tokenizer."""

    def __init__(self, student: StudentTokenizer, options: OtherTokenizerConfig, dataset: LogitDataset):
        self._student, self._options = student, options
        self._context: int | None = None
        self._collators: dict[tuple[str, ...], AlignedCollator] = {}
        self._named = 0
        self.header = header_of_student(dataset, student)
        self.objective: AlignedObjective

    def prepare(
        self,
        dataset: LogitDataset,
        loss: Loss,
        *,
        evaluated: Iterable[LogitDataset],
        pack_length: int | None,
        context: int | None,
        sees_images: bool,
    ) -> AlignedObjective:
        """What training minimizes, after the checks of all settings; logs which share of some rows each part gets.

        `context`: most tokens of a row of the student.

        Raises `OtherTokenizerUnsupported`, `TokenizerNotAligned`, and what `build_objective` raises.
        """
        if len(dataset.by_teacher) > 1:
            raise _unsupported("data.ensemble", f"{len(dataset.by_teacher)} teachers", "a single dataset, or a mix")
        self._check(loss, pack_length=pack_length, sees_images=sees_images)
        self._context, self.objective = context, self._objective(loss, dataset)
        found = sampled(dataset, self.collator(dataset))
        logger.warning(
            f"{self._student.name} has another tokenizer than the dataset: {found}. With loss {loss.name}, "
            f"{self._parts(loss)}."
        )
        for part in evaluated:
            sampled(part, self.collator(part))
        return self.objective

    def collator(self, dataset: LogitDataset) -> AlignedCollator:
        """Makes the batches of a dataset with the tokenizer of the training's."""
        if dataset.dataset_ids not in self._collators:
            self._collators[dataset.dataset_ids] = collator_of(dataset, self._student, context=self._context)
        return self._collators[dataset.dataset_ids]

    def count(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Count the micro-batches of an optimizer step, and log the rows that were skipped."""
        for batch in batches:
            self.objective.counts.add_batch(batch)
            for name, reason in batch["skipped"]:
                if self._named < _MOST_NAMED:
                    logger.warning(f"row {name!r} is skipped: {reason}")
                    self._named += 1
                    if self._named == _MOST_NAMED:
                        logger.warning("further skipped rows are counted in skipped_rows only")

    def evaluate(
        self, model: Any, batches: Iterable[Mapping[str, Any]], *, reduce: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, float]:
        """The figures of `evaluate_text`."""
        return evaluate_text(model, batches, token_count=self.header.token_count, reduce=reduce)

    def _objective(self, loss: Loss, dataset: LogitDataset) -> AlignedObjective:
        inner = None
        if not isinstance(loss, CrossEntropy):
            facts = {name: dataset.facts()[name] for name in ("draws", "mean_tail_mass", "not_by_student")}
            inner = build_objective(loss, **facts)
            if state_of(inner) is not None:
                raise _unsupported(
                    "loss.name", f"{loss.name}, which keeps numbers between steps", "a loss without state"
                )
        options = self._options
        return AlignedObjective.of(
            inner, one_to_one=options.one_to_one, chunks=options.chunks, temperature=options.temperature
        )

    def _check(self, loss: Loss, *, pack_length: int | None, sees_images: bool) -> None:
        if pack_length is not None:
            raise _unsupported("pack_length", pack_length, "null: the student's row lengths are not known beforehand")
        if sees_images:
            raise _unsupported(f"student {self._student.name}", "a student that sees images", "a student of text")
        if (tail := getattr(loss, "tail", None)) in ("mass_corrected", "control_variate"):
            raise _unsupported(
                "loss.tail", f"{tail}, which needs the student's log-prob of every draw", "mixture or bucket"
            )
        if "dense" in loss.needs:
            raise _unsupported("loss.name", f"{loss.name}, which needs every id", "a loss such as taid or forward_kl")
        if not (self._options.one_to_one or self._options.chunks or loss.label_share or isinstance(loss, CrossEntropy)):
            raise _unsupported("data.other_tokenizer", "two weights of 0", "one_to_one or chunks above 0")

    def _parts(self, loss: Loss) -> str:
        if isinstance(loss, CrossEntropy):
            return "the cross-entropy of all of them"
        options = self._options
        parts = [
            f"tokens with the teacher's distribution get {loss.name} with weight {options.one_to_one:g}",
            f"others in larger chunks get ALM with weight {options.chunks:g}",
            "lost ones get none" if not loss.label_share else f"all get cross-entropy with share {loss.label_share:g}",
        ]
        return ", ".join(parts)


def header_of_student(dataset: LogitDataset, student: StudentTokenizer) -> DatasetHeader:
    """The dataset's header with the ids of the student's tokenizer: a head must have a row for each, and the student
    stops at its own end of a turn where rows are chats.

    Raises `TokenizerNotAligned`, `TokenizerNotFound`.
    """
    facts = fingerprint_bytes(student.tokenizer_json, where=f"tokenizer of the student {student.name}")
    end = None
    if any(source.header.chat_template_sha256 for source in dataset.sources.datasets):
        tokens = TokenBytes(student.tokenizer_json, where=f"the student {student.name}")
        end = ChatTurns(student.tokenizer, tokens).end_id
    about = dataset.header.about.model_copy(update={"end_token_ids": None if end is None else (end,)})
    ids = {"tokenizer_fingerprint": facts.fingerprint, "token_count": facts.token_count}
    return dataset.header.model_copy(update={**ids, "about": about})


def _unsupported(what: str, found: object, wanted: str) -> OtherTokenizerUnsupported:
    return OtherTokenizerUnsupported(
        f"{what}, for a student with another tokenizer than the dataset's",
        found=found,
        wanted=wanted,
        fix="change this setting, or choose a student with the teacher's tokenizer",
    )
