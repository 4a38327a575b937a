"""One worker: a unit's number in, a committed shard out. Knows source, teacher and store; not the cluster."""

from __future__ import annotations

import time
from typing import NamedTuple

from storage_schema.commits import CommitRecord, Reject, commit_name, commit_unit, read_commit
from storage_schema.faithfulness import sample_share
from storage_schema.header import HEADER_NAME, DatasetHeader
from storage_schema.plan import PLAN_NAME, Unit, plan_from_bytes
from storage_schema.rows import CachedRow
from storage_schema.store import Store

from .config import CaptureConfig
from .prepare import load_tokenizer
from .sequences import TokenSequence
from .sources.chat import SequenceMaker
from .sources.readers import open_source
from .teachers.protocol import Teacher, load_teacher


class UnitReport(NamedTuple):
    """The few numbers that travel to the driver; rows and log-probs never do."""

    unit: int
    rows: int
    rejected: int
    tokens: int
    targets: int
    bytes: int


class CaptureWorker:
    """Does units of one capture, one after the other."""

    def __init__(self, config: CaptureConfig, teacher: Teacher | None = None):
        self.store = Store(config.output)
        self.header = DatasetHeader.from_bytes(self.store.read(HEADER_NAME), where=HEADER_NAME)
        self._units = plan_from_bytes(self.store.read(PLAN_NAME), where=PLAN_NAME)
        self._source = open_source(config.source.path)
        self._maker = SequenceMaker(
            load_tokenizer(config.teacher), source=config.source, max_length=config.teacher.max_length
        )
        self._teacher = teacher or load_teacher(config.teacher, self.header)

    def run(self, index: int) -> UnitReport:
        """Read, score, encode and commit unit number `index`; a unit that is committed already is left as it is.

        Raises the named errors of sources, teachers and stores; nothing of the unit is visible then.
        """
        if self.store.exists(commit_name(index)):
            return _report(read_commit(self.store, index))
        sequences, rejects = self._sequences(self._units[index])
        started = time.monotonic()
        targets = self._teacher.score(sequences)
        seconds = time.monotonic() - started
        rows = [
            CachedRow(
                sample_id=sequence.sample_id,
                token_ids=sequence.token_ids,
                target_spans=sequence.target_spans,
                targets=row_targets,
                metadata=sequence.metadata,
            )
            for sequence, row_targets in zip(sequences, targets, strict=True)
        ]
        environment = {**self._teacher.environment, "score_seconds": round(seconds, 3)}
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

    def _sequences(self, unit: Unit) -> tuple[list[TokenSequence], list[Reject]]:
        made = [self._maker.make(row) for row in self._source.read(unit)]
        sequences = [result for result in made if isinstance(result, TokenSequence)]
        return sequences, [result for result in made if isinstance(result, Reject)]


def _report(record: CommitRecord) -> UnitReport:
    return UnitReport(record.unit, record.rows, record.rejected, record.tokens, record.targets, record.shard.bytes)
