"""One worker: reads the rows of a work unit, scores, encodes and commits them.

Uses the source, the teacher and the store, and does not import Ray. Two units may be in progress at once, in two
threads: while one is encoded and committed, the teacher scores the next. With `order: exact` the teacher gets one call
at a time, so that a unit is a barrier; with `fast` the calls overlap.

`measure_speed` measures one worker for `--dry-run --probe`. It scores the first sequences of the source in slices of
growing size until the time is up, and reports the slice with most tokens. So the engine's warm-up does not count, and a
slow machine gets no more work than it can do in the time.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

from coldstill.common.models import FrozenModel
from coldstill.pipeline.config import CaptureConfig, SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid, all_rejected
from coldstill.pipeline.expected_bytes import fix_of_large_shards
from coldstill.pipeline.reject_reasons import REJECT_REASONS, RejectReason, reject_reasons_of
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.sources.source import open_source
from coldstill.pipeline.teachers.checkpoint import with_read_length
from coldstill.pipeline.teachers.protocol import (
    ScoreResult,
    Teacher,
    TokenSequence,
    UnscoredSequence,
    scored_of,
)
from coldstill.storage_schema.codec import MAX_ENTRIES
from coldstill.storage_schema.commits import CommitRecord, Reject, commit_name, commit_unit, read_commit
from coldstill.storage_schema.errors import ShardTooLarge
from coldstill.storage_schema.faithfulness import sample_share
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.media import place_media
from coldstill.storage_schema.plan import PLAN_NAME, plan_from_bytes
from coldstill.storage_schema.shard import write_shard
from coldstill.storage_schema.store.retrying import RetryingStore

TeacherLoader = Callable[[TeacherConfig, DatasetHeader, SamplingConfig | None], Teacher]
TaskKind = Literal["whole", "probe", "rest", "parts"]

_FIRST_SLICE = 8
_GROWTH = 2
_JUDGED_ROWS = 16
"""At least as many rows are judged together: of a unit of one row, that row alone would stand for the teacher."""


class ExcludedRow(FrozenModel):
    """A poison row: a source row that kills every worker that scores it. `detail` becomes the reject's detail."""

    source_row: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class UnitTask:
    """What a worker does with a unit: commit it, without the `excluded` rows and in `parts` if there are any; or,
    with kind `probe`, score source rows `start` to `stop` and discard the result."""

    unit: int
    kind: TaskKind
    start: int
    stop: int
    excluded: tuple[ExcludedRow, ...] = ()
    parts: tuple[tuple[int, int], ...] = ()


class UnitReport(NamedTuple):
    """The numbers of a committed unit that the worker sends to the driver; rows and log-probs are not sent."""

    unit: int
    rows: int
    rejected: int
    tokens: int
    targets: int
    bytes: int
    reasons: dict[str, int] = {}


class SpeedReport(NamedTuple):
    """The figures of one slice: `sequences` sent to the teacher, `tokens` and `targets` that it returned, the `seconds`
    that it took, and the `bytes` of a shard of the result."""

    sequences: int
    tokens: int
    targets: int
    seconds: float
    bytes: int


class CaptureWorker:
    """Processes the units of one capture. `run` and `probe` may be called from two threads."""

    def __init__(self, config: CaptureConfig, teacher: Teacher | None = None):
        self.store = RetryingStore(config.output, retry_for_s=config.cluster.store_retry_s)
        self.header = DatasetHeader.from_bytes(self.store.read(HEADER_NAME), where=HEADER_NAME)
        self._units = plan_from_bytes(self.store.read(PLAN_NAME), where=PLAN_NAME)
        self._source_config = config.source
        self._source = open_source(config.source, self.store)
        self._maker = SequenceMaker.of(config, header=self.header)
        self._teacher = teacher or load_for(config, self.header)
        self._unscored: deque[bool] = deque(maxlen=_JUDGED_ROWS)
        self._maker_lock = threading.Lock()  # a tokenizer that two threads use raises "Already borrowed"
        self._teacher_lock: AbstractContextManager[object] = (
            threading.Lock() if self.header.order == "exact" else nullcontext()
        )

    def run(self, index: int, task: UnitTask | None = None) -> UnitReport:
        """Read, score, encode and commit unit number `index`. A unit that is already committed stays as it is.

        The `excluded` rows of `task` become rejects, and its `parts` are scored one after the other.
        Raises the named errors of sources, teachers and stores; then nothing of the unit is visible.
        """
        if self.store.exists(commit_name(index)):
            return _report(read_commit(self.store, index))
        sequences, rejects = self._sequences(index)
        if task:
            sequences, poison = _without(sequences, task.excluded)
            rejects = sorted([*rejects, *poison], key=lambda reject: reject.source_row)
        parts = _parts_of(sequences, task.parts) if task and task.parts else [sequences]
        results: list[ScoreResult] = []
        seconds = 0.0
        for part in parts:
            scored, took = self._score(part)
            results += [_storable(result, self.header) for result in scored]
            seconds += took
        self._require_working_teacher(index, results)
        rejects = sorted([*rejects, *_rejects_of(results)], key=lambda reject: reject.source_row)
        environment = {**self._teacher.environment, "score_seconds": round(seconds, 3)}
        if len(parts) > 1:
            environment["parts"] = len(parts)
        if rejects:
            environment[REJECT_REASONS] = dict(Counter(str(reject.reason) for reject in rejects))
        try:
            commit = commit_unit(
                self.store,
                index,
                rows=[one.row for one in scored_of(results)],
                rejects=rejects,
                header=self.header,
                environment=environment,
                faithful_positions=sample_share(index, units=len(self._units)),
            )
        except ShardTooLarge as error:
            fix = fix_of_large_shards(self._source_config)
            raise ShardTooLarge(error.what, found=error.found, wanted=error.wanted, fix=fix) from None
        return _report(commit)

    def probe(self, index: int, start: int, stop: int) -> None:
        """Score source rows `start` to `stop` of a unit and discard the result. Raises what `run` raises."""
        sequences, _ = self._sequences(index)
        self._score([sequence for sequence in sequences if start <= sequence.source_row < stop])

    def _sequences(self, index: int) -> tuple[list[TokenSequence], list[Reject]]:
        with self._maker_lock:
            made = list(self._maker.sequences(self._source.read(self._units[index])))
        sequences = [result for result in made if isinstance(result, TokenSequence)]
        return sequences, [result for result in made if isinstance(result, Reject)]

    def _require_working_teacher(self, index: int, results: Sequence[ScoreResult]) -> None:
        """Raise `TeacherOutputInvalid` if the teacher gave no finite logits for most rows of the unit, or for most of
        the last rows if the unit is small. The rows themselves are at fault if only some are, or for another reason,
        such as images that take too many tokens."""
        unscored = [
            isinstance(result, UnscoredSequence) and result.reason is RejectReason.NON_FINITE_LOGITS
            for result in results
        ]
        self._unscored.extend(unscored)
        judged = unscored if len(unscored) >= _JUDGED_ROWS else list(self._unscored)
        if any(unscored) and 2 * sum(judged) > max(len(judged), _JUDGED_ROWS):
            raise TeacherOutputInvalid(
                f"rows of unit {index}",
                found=f"NaN or infinite logits for {sum(judged)} of {len(judged)}",
                wanted="finite logits for most rows; a single row without them is rejected",
                fix="check the teacher's weights, or set another teacher.dtype: the model may overflow in this one",
            )

    def _score(self, sequences: Sequence[TokenSequence]) -> tuple[Sequence[ScoreResult], float]:
        """The teacher's results, and the seconds that the teacher took. Without sequences the teacher is not called."""
        if not sequences:
            return [], 0.0
        with self._teacher_lock:
            started = time.monotonic()
            scored = self._teacher.score(sequences)
            return scored, time.monotonic() - started


def load_teacher(config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None) -> Teacher:
    """Load the engine that `config.engine` names; its libraries are imported only here.

    `sampling`: the teacher answers prompts; without it, it scores given sequences. Raises `TeacherUnusable`, and
    `PluginNotFound` for a class that cannot be imported.
    """
    if config.is_own_class:
        from .teachers.custom_teacher import CheckedTeacher

        return CheckedTeacher(config, header, sampling)
    if config.engine == "vllm":
        from .teachers.vllm.teacher import VllmTeacher

        return VllmTeacher(config, header, sampling)
    if config.engine == "endpoint":
        from .teachers.endpoint_teacher import EndpointTeacher

        return EndpointTeacher(config, header, sampling)
    from .teachers.transformers_teacher import TransformersTeacher

    return TransformersTeacher(config, header, sampling)


def load_for(config: CaptureConfig, header: DatasetHeader, load: TeacherLoader = load_teacher) -> Teacher:
    """Load the teacher of a capture. Raises `TeacherUnusable`."""
    config = with_read_length(config)
    return load(config.teacher, header, config.sampling if config.mode == "generate" else None)


def measure_speed(
    teacher: Teacher, header: DatasetHeader, sequences: Sequence[TokenSequence], *, seconds: float
) -> SpeedReport:
    """The report of the slice with most tokens. Raises `AllRowsRejected`, and the named errors of teachers."""
    reports: list[SpeedReport] = []
    rejects: list[Reject] = []
    start, size, begun = 0, _FIRST_SLICE, time.monotonic()
    while start < len(sequences) and (not reports or time.monotonic() - begun < seconds):
        report, rejected = _measure_slice(teacher, header, sequences[start : start + size])
        reports.append(report)
        rejects += rejected
        start, size = start + size, size * _GROWTH
    best = max(reports, key=lambda report: report.tokens)
    if not best.tokens:  # nothing to extrapolate from
        example = f"row {rejects[0].source_row}: {rejects[0].detail}"
        what = f"the first {len(rejects)} rows that the teacher got"
        raise all_rejected(Counter(str(reject.reason) for reject in rejects), what=what, example=example)
    return best


def _measure_slice(
    teacher: Teacher, header: DatasetHeader, sequences: Sequence[TokenSequence]
) -> tuple[SpeedReport, list[Reject]]:
    """The report of one slice, and its rejects."""
    started = time.monotonic()
    scored = teacher.score(sequences)
    seconds = time.monotonic() - started
    # Images as files, which are not written: their bytes are known, and do not grow with the targets.
    rows = place_media([one.row for one in scored_of(scored)], in_row_bytes=0).rows
    report = SpeedReport(
        sequences=len(sequences),
        tokens=sum(one.sequence.token_ids.size for one in scored_of(scored)),
        targets=sum(row.targets.positions for row in rows),
        seconds=seconds,
        bytes=len(write_shard(rows, header=header)),
    )
    return report, _rejects_of(scored)


def _without(
    sequences: Sequence[TokenSequence], excluded: Sequence[ExcludedRow]
) -> tuple[list[TokenSequence], list[Reject]]:
    """The sequences of all other rows, and a reject for each sequence of an excluded row."""
    details = {row.source_row: row.detail for row in excluded}
    rejects = [
        Reject(sequence.source_row, sequence.sample_id, RejectReason.KILLS_THE_ENGINE, details[sequence.source_row])
        for sequence in sequences
        if sequence.source_row in details
    ]
    return [sequence for sequence in sequences if sequence.source_row not in details], rejects


def _storable(result: ScoreResult, header: DatasetHeader) -> ScoreResult:
    """The result, or a reject of an answer or row with more kept ids or draws than readers take of a row."""
    if isinstance(result, UnscoredSequence):
        return result
    sequence, targets = result
    if max(targets.positions * header.top_k, targets.draw_ids.size) <= MAX_ENTRIES:
        return result
    found = f"{targets.positions:,} targets of {header.top_k:,} kept ids, and {targets.draw_ids.size:,} draws"
    detail = f"{found}; at most {MAX_ENTRIES:,} of both in a row"
    return UnscoredSequence(sequence.sample_id, sequence.source_row, RejectReason.TOO_MANY_TARGETS, detail)


def _rejects_of(results: Sequence[ScoreResult]) -> list[Reject]:
    unscored = [result for result in results if isinstance(result, UnscoredSequence)]
    return [Reject(source_row, sample_id, reason, detail) for sample_id, source_row, reason, detail in unscored]


def _parts_of(sequences: Sequence[TokenSequence], parts: Sequence[tuple[int, int]]) -> list[list[TokenSequence]]:
    """The sequences of each part, in source order."""
    return [[item for item in sequences if start <= item.source_row < stop] for start, stop in sorted(parts)]


def _report(record: CommitRecord) -> UnitReport:
    size, reasons = record.shard.bytes, reject_reasons_of(record)
    return UnitReport(record.unit, record.rows, record.rejected, record.tokens, record.targets, size, reasons)
