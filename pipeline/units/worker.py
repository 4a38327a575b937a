"""One worker: a unit's number in, a committed shard out. Knows source, teacher and store; not the cluster.

Two units may be under way at once, in two threads: while one is encoded and committed, the teacher has the next. With
`order: exact` one call of the teacher runs at a time, so that a unit is a barrier; with `fast` they overlap.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from coldstill.pipeline.config import CaptureConfig, SamplingConfig, TeacherConfig
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.sequences import ScoredSequence, TokenSequence
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.sources.source import open_source
from coldstill.pipeline.teachers.protocol import Teacher, load_teacher
from coldstill.storage_schema.commits import CommitRecord, Reject, commit_name, commit_unit, read_commit
from coldstill.storage_schema.faithfulness import sample_share
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.plan import PLAN_NAME, plan_from_bytes
from coldstill.storage_schema.rows import CachedRow

from .attempts import ExcludedRow
from .bisection import UnitTask
from .patience import PatientStore

TeacherLoader = Callable[[TeacherConfig, DatasetHeader, SamplingConfig | None], Teacher]


class UnitReport(NamedTuple):
    """The few numbers that travel to the driver; rows and log-probs never do."""

    unit: int
    rows: int
    rejected: int
    tokens: int
    targets: int
    bytes: int


class CaptureWorker:
    """Does units of one capture. `run` and `probe` may be called in two threads."""

    def __init__(self, config: CaptureConfig, teacher: Teacher | None = None):
        self.store = PatientStore(config.output, patience_s=config.cluster.store_retry_s)
        self.header = DatasetHeader.from_bytes(self.store.read(HEADER_NAME), where=HEADER_NAME)
        self._units = plan_from_bytes(self.store.read(PLAN_NAME), where=PLAN_NAME)
        self._source = open_source(config.source, self.store)
        self._maker = SequenceMaker.of(config)
        self._teacher = teacher or load_for(config, self.header)
        self._scored = _generated if config.mode == "generate" else _scored
        self._makers_turn = threading.Lock()  # a tokenizer of two threads raises "Already borrowed"
        self._teachers_turn: AbstractContextManager[object] = (
            threading.Lock() if self.header.order == "exact" else nullcontext()
        )

    def run(self, index: int, task: UnitTask | None = None) -> UnitReport:
        """Read, score, encode and commit unit number `index`; a unit that is committed already is left as it is.

        `task`: without its excluded rows, which become rejects, and in its parts.
        Raises the named errors of sources, teachers and stores; nothing of the unit is visible then.
        """
        if self.store.exists(commit_name(index)):
            return _report(read_commit(self.store, index))
        sequences, rejects = self._sequences(index)
        if task:
            sequences, deadly = _without(sequences, task.excluded)
            rejects = sorted([*rejects, *deadly], key=lambda reject: reject.source_row)
        parts = _parts_of(sequences, task.parts) if task and task.parts else [sequences]
        rows: list[CachedRow] = []
        seconds = 0.0
        for part in parts:
            scored, took = self._ask(part)
            rows += [answer.row for answer in scored]
            seconds += took
        environment = {**self._teacher.environment, "score_seconds": round(seconds, 3)}
        if len(parts) > 1:
            environment["parts"] = len(parts)
        return _report(
            commit_unit(
                self.store,
                index,
                rows=rows,
                rejects=rejects,
                header=self.header,
                environment=environment,
                faithful_positions=sample_share(index, units=len(self._units)),
            )
        )

    def probe(self, index: int, start: int, stop: int) -> None:
        """Score what is made of source rows `start` to `stop` of a unit, and throw the result away. Raises as `run`."""
        sequences, _ = self._sequences(index)
        self._ask([sequence for sequence in sequences if start <= sequence.source_row < stop])

    def _sequences(self, index: int) -> tuple[list[TokenSequence], list[Reject]]:
        with self._makers_turn:
            made = list(self._maker.sequences(self._source.read(self._units[index])))
        sequences = [result for result in made if isinstance(result, TokenSequence)]
        return sequences, [result for result in made if isinstance(result, Reject)]

    def _ask(self, sequences: Sequence[TokenSequence]) -> tuple[list[ScoredSequence], float]:
        """What the teacher says, and the seconds that it took. Nothing is asked about no sequences."""
        if not sequences:
            return [], 0.0
        with self._teachers_turn:
            started = time.monotonic()
            scored = self._scored(self._teacher, sequences)
            return scored, time.monotonic() - started


def load_for(config: CaptureConfig, header: DatasetHeader, load: TeacherLoader = load_teacher) -> Teacher:
    """The teacher of a capture. Raises `TeacherUnusable`."""
    return load(config.teacher, header, config.sampling if config.mode == "generate" else None)


def _scored(teacher: Teacher, sequences: Sequence[TokenSequence]) -> list[ScoredSequence]:
    return [ScoredSequence(*pair) for pair in zip(sequences, teacher.score(sequences), strict=True)]


def _generated(teacher: Teacher, prompts: Sequence[TokenSequence]) -> list[ScoredSequence]:
    return teacher.generate(prompts)


def _without(
    sequences: Sequence[TokenSequence], excluded: Sequence[ExcludedRow]
) -> tuple[list[TokenSequence], list[Reject]]:
    """The sequences that are not of these rows, and rejects for those that are."""
    details = {row.source_row: row.detail for row in excluded}
    rejects = [
        Reject(sequence.source_row, sequence.sample_id, RejectReason.KILLS_THE_ENGINE, details[sequence.source_row])
        for sequence in sequences
        if sequence.source_row in details
    ]
    return [sequence for sequence in sequences if sequence.source_row not in details], rejects


def _parts_of(sequences: Sequence[TokenSequence], parts: Sequence[tuple[int, int]]) -> list[list[TokenSequence]]:
    """The sequences of each part, in source order."""
    return [[item for item in sequences if start <= item.source_row < stop] for start, stop in sorted(parts)]


def _report(record: CommitRecord) -> UnitReport:
    return UnitReport(record.unit, record.rows, record.rejected, record.tokens, record.targets, record.shard.bytes)
