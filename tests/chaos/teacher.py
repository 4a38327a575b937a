"""A fake teacher for captures that are killed: fast, and with the same values in every process.

Its values depend on the sample alone. With `order: fast` each process adds a little noise of its own, like an engine
whose batches differ. Then a unit that runs twice has two shards of different bytes, and one must win.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.teachers.answer_sampling import answer_sequence
from coldstill.pipeline.teachers.protocol import ScoredSequence, TokenSequence, answer_name
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets, span_positions
from tests import making

NOISE = 1e-3
"""Nats, of `order: fast`."""
_LONGEST_ANSWER = 8


@dataclass(frozen=True)
class LoadFakeTeacher:
    """Loads the fake teacher in place of an engine; `seconds`: duration of a call."""

    seconds: float = 0.0

    def __call__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None) -> FakeTeacher:
        return FakeTeacher(header, sampling=sampling, seconds=self.seconds)


class FakeTeacher:
    """See `pipeline.teachers.protocol.Teacher`."""

    processes: tuple[int, ...] = ()

    def __init__(self, header: DatasetHeader, *, sampling: SamplingConfig | None, seconds: float):
        self._header, self._sampling, self._seconds = header, sampling, seconds
        self._noise = np.random.default_rng() if header.order == "fast" else None
        self.environment: dict[str, Any] = {"engine": "fake"}
        self.progress = 0

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoredSequence]:
        """Targets of each sequence; with sampling, answers of different lengths to each."""
        time.sleep(self._seconds)
        if self._sampling is None:
            return [ScoredSequence(sequence, self._targets(sequence)) for sequence in sequences]
        return self._answers(sequences, self._sampling)

    def _answers(self, prompts: Sequence[TokenSequence], sampling: SamplingConfig) -> list[ScoredSequence]:
        made = []
        for prompt in prompts:
            for number in range(sampling.n):
                rng = _rng_of(answer_name(prompt.sample_id, number, answers=sampling.n))
                tokens = rng.integers(0, self._header.token_count, int(rng.integers(1, _LONGEST_ANSWER + 1)))
                answer = answer_sequence(
                    prompt, tokens.tolist(), number=number, answers=sampling.n, finish_reason="stop"
                )
                made.append(ScoredSequence(answer, self._targets(answer)))
        return made

    def _targets(self, sequence: TokenSequence) -> TeacherTargets:
        self.progress += 1
        header, positions = self._header, span_positions(sequence.target_spans).size
        targets = making.wide_targets(
            _rng_of(sequence.sample_id),
            np.full(positions, header.top_k),
            vocabulary=header.token_count,
            top_k=header.top_k,
            most_draws=header.kept_draws,
        )
        if self._noise is not None:
            targets.logprobs[...] -= self._noise.uniform(0, NOISE, targets.logprobs.shape).astype(np.float32)
        return targets


def _rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:8]))
