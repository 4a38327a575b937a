"""A teacher with the faults of an engine, for workers of real Ray: `WorkerPool(config, load=Faults(...))`.

Its values depend on the sample alone, so that a run with faults can be compared with an unbroken one. Faults that
happen only once leave a mark in a folder that all processes see.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.teachers.protocol import ScoredSequence, TokenSequence
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets, span_positions
from tests import making


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Sample ids by the fault that scoring them causes, and other faults. Loads the teacher that has them."""

    folder: str
    poison: tuple[str, ...] = ()
    killed_once: tuple[str, ...] = ()
    hangs_once: tuple[str, ...] = ()
    loses_a_process_once: tuple[str, ...] = ()
    raises: tuple[str, ...] = ()
    most_rows: int = 1 << 20
    """A call of more rows runs out of memory."""
    invalid: tuple[str, ...] = ()
    seconds: float = 0.0
    """Duration of a call."""
    start_fails: bool = False

    def __call__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None) -> FaultyTeacher:
        if self.start_fails:
            raise TeacherUnusable("the faulty teacher", found="a fault", wanted="none")
        return FaultyTeacher(self, header, sampling)

    def first_time(self, name: str) -> bool:
        """Whether this is the first call with this name, in any process."""
        try:
            os.close(os.open(Path(self.folder, name), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


class FaultyTeacher:
    """A `protocol.Teacher` with faults."""

    def __init__(self, faults: Faults, header: DatasetHeader, sampling: SamplingConfig | None):
        self._faults, self._header, self._sampling = faults, header, sampling
        self.environment: dict[str, Any] = {"engine": "faulty"}
        self.progress = 0
        self.processes: tuple[int, ...] = ()
        self._helper: subprocess.Popen[bytes] | None = None
        if faults.loses_a_process_once:
            self._helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            self.processes = (self._helper.pid,)

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoredSequence]:
        """Targets of each sequence, after the faults; with sampling, see `_answers`."""
        if self._sampling is not None:
            return self._answers(sequences)
        ids = {sequence.sample_id for sequence in sequences}
        faults = self._faults
        if len(sequences) > faults.most_rows:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if ids & set(faults.poison):
            os._exit(1)
        if ids & set(faults.raises):
            raise KeyError("a defect of the engine")
        if ids & set(faults.invalid):
            raise TeacherOutputInvalid("the faulty teacher", found="NaN", wanted="a number")
        for name in sorted(ids & set(faults.killed_once)):
            if faults.first_time(f"killed-{name}"):
                os.kill(os.getpid(), signal.SIGKILL)
        for name in sorted(ids & set(faults.hangs_once)):
            if faults.first_time(f"hangs-{name}"):
                threading.Event().wait()
        for name in sorted(ids & set(faults.loses_a_process_once)):
            if faults.first_time(f"loses-{name}") and self._helper:
                self._helper.kill()
                threading.Event().wait()
        time.sleep(faults.seconds)
        return [ScoredSequence(sequence, self._targets(sequence)) for sequence in sequences]

    def _answers(self, prompts: Sequence[TokenSequence]) -> list[ScoredSequence]:
        """The prompts themselves, all of each but its first token as answer."""
        answers = []
        for prompt in prompts:
            spans = np.array([[0, prompt.token_ids.size - 1]], np.int32)
            answer = TokenSequence(
                sample_id=f"{prompt.sample_id}#0",
                source_row=prompt.source_row,
                token_ids=prompt.token_ids,
                target_spans=spans,
                metadata={"finish_reason": "stop"},
            )
            answers.append(ScoredSequence(answer, self._targets(answer)))
        return answers

    def _targets(self, sequence: TokenSequence) -> TeacherTargets:
        self.progress += 1
        seed = int.from_bytes(hashlib.sha256(sequence.sample_id.encode()).digest()[:8], "little")
        positions = span_positions(sequence.target_spans)
        probs = making.random_probs(np.random.default_rng(seed), positions.size, self._header.token_count)
        return making.targets_of(probs, sequence.token_ids[positions + 1], top_k=self._header.top_k)
