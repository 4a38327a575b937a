"""What every engine gives: sequences in, the teacher's distributions out, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.sequences import ScoredSequence, TokenSequence
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets


class Teacher(Protocol):
    """A loaded engine. Of a header with `order: fast` its calls may overlap in several threads: an engine that can
    works on all of them at once. With `order: exact` the caller makes one call at a time."""

    @property
    def environment(self) -> dict[str, Any]:
        """Engine, versions and hardware, for the commit records."""
        ...

    @property
    def progress(self) -> int:
        """Grows while a call makes progress: the watchdog's sign of life. Never blocks."""
        ...

    @property
    def processes(self) -> tuple[int, ...]:
        """Processes without which no call returns, beside the caller's own."""
        ...

    def score(self, sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
        """The teacher's distributions at the target positions of each sequence, teacher-forced.

        All sequences are queued before the first is computed: equal calls give equal bits on equal hardware.
        Raises `TeacherOutputInvalid`.
        """
        ...

    def generate(self, prompts: Sequence[TokenSequence]) -> list[ScoredSequence]:
        """The teacher's answers, `sampling.n` to each prompt, one after the other: each a sequence of prompt and answer
        with the answer's tokens as targets, and `finish_reason` (`stop` or `length`) in its metadata.

        The sample id of answer number `i` of several is `ID#i`. The stored log-probs are those of the untempered
        softmax. Raises `TeacherOutputInvalid`.
        """
        ...


def load_teacher(config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None) -> Teacher:
    """The engine that `config.engine` names, loaded; its libraries are imported only here. `sampling` is needed for
    `generate`."""
    if config.engine == "vllm":
        from .vllm.teacher import VllmTeacher

        return VllmTeacher(config, header, sampling)
    if config.engine == "endpoint":
        from .endpoint_teacher import EndpointTeacher

        return EndpointTeacher(config, header, sampling)
    from .transformers_teacher import TransformersTeacher

    return TransformersTeacher(config, header, sampling)
