"""A teacher that sleeps, so that a benchmark measures everything around an engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.teachers.protocol import ScoredSequence, TokenSequence
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets, span_positions


@dataclass(frozen=True)
class Sleeping:
    """Loads teachers whose calls take `seconds`."""

    seconds: float

    def __call__(
        self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None
    ) -> SleepingTeacher:
        return SleepingTeacher(self.seconds, top_k=header.top_k)


class SleepingTeacher:
    """Returns the same distribution at every position."""

    def __init__(self, seconds: float, *, top_k: int):
        self._seconds, self._top_k = seconds, top_k
        self.environment: dict[str, Any] = {"engine": "sleep"}
        self.progress = 0
        self.processes: tuple[int, ...] = ()

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoredSequence]:
        """Sleep, then return K ids of equal mass at each position."""
        time.sleep(self._seconds)
        self.progress += 1
        return [
            ScoredSequence(sequence, self._targets(span_positions(sequence.target_spans).size))
            for sequence in sequences
        ]

    def _targets(self, positions: int) -> TeacherTargets:
        targets = TeacherTargets.empty(positions, self._top_k)
        targets.ids[:] = np.arange(self._top_k)
        targets.logprobs[:] = np.log(0.5 / self._top_k)
        targets.counts[:] = self._top_k
        targets.log_tail[:] = np.log(0.5)
        targets.label_logprob[:] = np.log(0.5 / self._top_k)
        return targets
