"""What every engine gives: sequences in, `TeacherTargets` out, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pipeline.config import TeacherConfig
from pipeline.sources.chat import TokenSequence
from storage_schema.header import DatasetHeader
from storage_schema.rows import TeacherTargets


class Teacher(Protocol):
    """A loaded engine."""

    @property
    def environment(self) -> dict[str, Any]:
        """Engine, versions and hardware, for the commit records."""
        ...

    def score(self, sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
        """The teacher's distributions at the target positions of each sequence, teacher-forced.

        All sequences are queued before the first is computed: equal calls give equal bits on equal hardware.
        Raises `TeacherOutputInvalid`.
        """
        ...


def load_teacher(config: TeacherConfig, header: DatasetHeader) -> Teacher:
    """The engine that `config.engine` names, loaded; its libraries are imported only here."""
    if config.engine == "vllm":
        from .vllm_teacher import VllmTeacher

        return VllmTeacher(config, header)
    from .transformers_teacher import TransformersTeacher

    return TransformersTeacher(config, header)
