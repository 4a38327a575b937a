"""Makes batches of stored rows in the tokens of a student with another tokenizer; it is sent to loader workers."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE
from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.errors import TokenizerNotAligned
from coldstill.trainer.student.tokenizer import StudentTokenizer

from .aligned_rows import AlignedRow, RowAligner, RowSkipped
from .chat_turns import ChatTurns
from .id_map import map_ids
from .targets import collate_aligned
from .token_bytes import TokenBytes

_SAMPLED_ROWS = 64
_DAY = date(2025, 1, 1)
"""Shown by a template that asks for today's date where the dataset names none: a resumed run must read equal rows."""


@dataclass(frozen=True)
class AlignedCollator:
    """`aligners`: one for each dataset of the stream. `id_map int64 [V]`: of `map_ids`."""

    aligners: Sequence[RowAligner]
    id_map: np.ndarray

    def collate(self, rows: Sequence[CachedRow], datasets: Sequence[int], *, top_k: int | None) -> dict[str, Any]:
        """The batch of `collate_aligned`. `datasets`: the number of the dataset of each row.

        `skipped`: name and reason of each row that could not be aligned; it stays in the batch without a target.
        """
        aligned, skipped = [], []
        for row, number in zip(rows, datasets, strict=True):
            try:
                aligned.append(self.aligners[number].align(row))
            except RowSkipped as error:
                skipped.append((row.sample_id, str(error.reason)))
                aligned.append(AlignedRow.empty(next(iter(self.aligners[number].begins), 0)))
        return {**collate_aligned(rows, aligned, self.id_map, top_k=top_k), "skipped": skipped}


def collator_of(dataset: LogitDataset, student: StudentTokenizer, *, context: int | None) -> AlignedCollator:
    """The collator of a dataset. `context`: the student's most tokens of a row.

    Raises `TokenizerNotAligned`, and what `Dataset.tokenizer_files` raises.
    """
    of_student = TokenBytes(student.tokenizer_json, where=f"the student {student.name}")
    known: dict[Any, RowAligner] = {}
    aligners, by_role = [], dict[int, int]()
    for source in dataset.sources.datasets:
        files = source.tokenizer_files()
        about = source.header.about
        is_chat = source.header.chat_template_sha256 is not None
        said = (*files.values(), is_chat, str(about.template_arguments), about.template_date, about.end_token_ids)
        if said not in known:
            known[said] = _aligner(source, files, of_student, student, is_chat=is_chat, context=context)
            by_role = {**_roles_in_map(known[said]), **by_role}
        aligners.append(known[said])
    return AlignedCollator(aligners, map_ids(aligners[0].teacher, of_student, by_role=by_role))


def _aligner(
    source: Dataset,
    files: dict[str, bytes],
    of_student: TokenBytes,
    student: StudentTokenizer,
    *,
    is_chat: bool,
    context: int | None,
) -> RowAligner:
    where = f"the dataset {source.store.url}"
    if TOKENIZER_FILE not in files:
        raise TokenizerNotAligned(
            f"tokenizer of {where}",
            found=f"no {TOKENIZER_FILE}",
            wanted="the teacher's tokenizer, to read the text of the rows",
            fix="capture the dataset again, or choose a student with the teacher's tokenizer",
        )
    of_teacher = TokenBytes(files[TOKENIZER_FILE], where=where)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    about = source.header.about
    day = date.fromisoformat(about.template_date) if about.template_date else _DAY
    theirs: Any = student.tokenizer
    ends = dict.fromkeys([tokenizer.eos_token_id, *(about.end_token_ids or ())])
    begins = _begins(theirs, of_student)
    aligner = RowAligner(
        teacher=of_teacher,
        student=of_student,
        teacher_chat=ChatTurns(tokenizer, of_teacher, arguments=about.template_arguments, day=day) if is_chat else None,
        student_chat=ChatTurns(theirs, of_student, day=day) if is_chat else None,
        begin=tokenizer.bos_token_id,
        begins=begins,
        roles={
            **({} if tokenizer.bos_token_id is None else {tokenizer.bos_token_id: next(iter(begins), None)}),
            **{end: theirs.eos_token_id for end in ends if end is not None},
        },
        context=context,
    )
    for chat in (aligner.teacher_chat, aligner.student_chat):
        if chat is not None:
            _ = chat.borders, chat.end_id  # learned once, before the aligner is copied
    return aligner


def _begins(tokenizer: Any, tokens: TokenBytes) -> tuple[int, ...]:
    """The special tokens that the student's tokenizer puts before a text."""
    found = []
    for id_ in tokenizer("a")["input_ids"]:
        if not tokens.special[id_]:
            break
        found.append(int(id_))
    return tuple(found)


def _roles_in_map(aligner: RowAligner) -> dict[int, int]:
    """Special tokens that a distribution of the teacher may hold, with the student's of the same role; those of turns
    come first."""
    pairs: dict[int, int] = {}
    if aligner.teacher_chat is not None and aligner.student_chat is not None:
        mine, theirs = aligner.teacher_chat.end_id, aligner.student_chat.end_id
        if mine is not None and theirs is not None:
            pairs[mine] = theirs
    others = {mine: theirs for mine, theirs in aligner.roles.items() if theirs is not None and mine not in pairs}
    return {**pairs, **others}


@dataclass(frozen=True)
class Sampled:
    """Counts of the sampled rows of a dataset. `positions`: the student's target positions with the teacher's
    distribution, other ones in chunks, lost ones. `skipped`: rows by reason."""

    rows: int
    positions: tuple[int, int, int]
    skipped: Counter[str]

    def __str__(self) -> str:
        total = max(1, sum(self.positions))
        kinds = ("with the teacher's distribution", "others in larger chunks", "lost")
        shares = ", ".join(f"{count / total:.1%} {kind}" for kind, count in zip(kinds, self.positions, strict=True))
        text = f"of {total:,} target tokens of the student in {self.rows} rows, {shares}"
        if self.skipped:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in self.skipped.most_common())
            text += f"; {self.skipped.total()} rows are skipped ({reasons})"
        return text


def sampled(dataset: LogitDataset, collator: AlignedCollator) -> Sampled:
    """Align some rows of each dataset. Raises `TokenizerNotAligned` if most of them are skipped, and what `Dataset.row`
    raises."""
    rows, positions, skipped = 0, np.zeros(3, np.int64), Counter[str]()
    for number, source in enumerate(dataset.sources.datasets):
        # A separate reader: open files must not be sent to loader workers with the streams.
        reader = Dataset(Store(source.store.url))
        numbers = np.linspace(0, len(reader) - 1, min(_SAMPLED_ROWS, len(reader))).round().astype(int)
        taken = [reader.row(place) for place in sorted(set(numbers.tolist()))]
        if dataset.sources.without_images:
            taken = [row for row in taken if not row.media]
        if not taken:
            continue
        batch = collator.collate(taken, [number] * len(taken), top_k=None)
        targets = batch["targets"]
        one, larger = int(targets.exact.sum()), int(targets.in_larger_chunk.sum())
        positions += (one, larger, targets.count - one - larger)
        rows += len(taken)
        skipped.update(reason for _, reason in batch["skipped"])
    found = Sampled(rows, (int(positions[0]), int(positions[1]), int(positions[2])), skipped)
    if (rows and skipped.total() > rows / 2) or not positions[:2].any():
        raise TokenizerNotAligned(
            f"rows of {dataset.sources.datasets[0].store.url} for a student with another tokenizer",
            found=str(found),
            wanted="at least half of the rows in the student's tokens",
            fix="choose a student with the teacher's tokenizer; for chats, save both tokenizers with the chat template "
            "that the rows were captured with",
        )
    return found
