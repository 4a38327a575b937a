"""The user's own teacher class, whose output is checked before it is stored.

Shape letters: `T` tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coldstill.common.errors import ColdstillError, type_and_line
from coldstill.common.plugins import load_plugin
from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.protocol import (
    ScoredSequence,
    ScoreResult,
    Teacher,
    TokenSequence,
    UnscoredSequence,
    answer_name,
    non_finite,
)
from coldstill.storage_schema.errors import InvalidRow, InvalidTargets
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets, span_positions

logger = logging.getLogger(__name__)


class CheckedTeacher:
    """The user's teacher. Raises `TeacherUnusable` if it cannot be constructed, `PluginNotFound` without a class."""

    def __init__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None):
        self._engine, self._header, self._sampling = config.engine, header, sampling
        self._read_length = header.about.max_read_length or header.max_length
        try:
            self._teacher: Teacher = load_plugin(config.engine, key="teacher.engine")(config, header, sampling)
        except ColdstillError:
            raise
        except Exception as error:
            logger.exception("%s could not be constructed", config.engine)
            raise TeacherUnusable(
                f"teacher.engine: {config.engine}",
                found=type_and_line(error),
                wanted="a class that is constructed with (config, header, sampling)",
                fix="construct it in a Python session to see where it fails",
            ) from error
        missing = [
            name for name in ("environment", "progress", "processes", "score") if not hasattr(self._teacher, name)
        ]
        if missing:
            raise TeacherUnusable(
                f"teacher.engine: {config.engine}",
                found=f"no {', '.join(missing)}",
                wanted="the members of coldstill.pipeline.teachers.protocol.Teacher",
                fix="subclass it: it has defaults of all but `score`",
            )

    @property
    def environment(self) -> dict[str, Any]:
        """See `Teacher`."""
        return {"engine": self._engine, **self._teacher.environment}

    @property
    def progress(self) -> int:
        """See `Teacher`."""
        return self._teacher.progress

    @property
    def processes(self) -> tuple[int, ...]:
        """See `Teacher`."""
        return self._teacher.processes

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        """See `Teacher`. Targets of NaN become an `UnscoredSequence`, as with the other engines.

        Raises `TeacherOutputInvalid` for output that violates the protocol or the format.
        """
        answers = self._sampling.n if self._sampling else 1
        scored = self._teacher.score(sequences)
        if not isinstance(scored, list) or len(scored) != len(sequences) * answers:
            found = f"a list of {len(scored)}" if isinstance(scored, list) else type(scored).__name__
            raise self._invalid("score", found, f"a list of {len(sequences) * answers}")
        return [
            self._checked(item, sequences[index // answers], number=index % answers)
            for index, item in enumerate(scored)
        ]

    def _checked(self, item: ScoreResult, given: TokenSequence, *, number: int) -> ScoreResult:
        where = f"row {given.sample_id!r}"
        if isinstance(item, UnscoredSequence):
            answers = self._sampling.n if self._sampling else 1
            wanted = (answer_name(given.sample_id, number, answers=answers), given.source_row)
            if (item.sample_id, item.source_row) != wanted:
                found = f"{item.sample_id!r} of source row {item.source_row}"
                raise self._invalid(where, found, f"{wanted[0]!r} of source row {wanted[1]}")
            if not isinstance(item.reason, RejectReason) or not isinstance(item.detail, str):
                raise self._invalid(where, f"reason {item.reason!r}", "a RejectReason, and a text as detail")
            return item
        if not isinstance(item, ScoredSequence):
            raise self._invalid(where, type(item).__name__, "a ScoredSequence")
        if not isinstance(item.sequence, TokenSequence):
            raise self._invalid(where, type(item.sequence).__name__, "a TokenSequence")
        if self._sampling is None:
            self._check_given(where, item.sequence, given)
        else:
            self._check_answer(where, item.sequence, given, number=number, answers=self._sampling.n)
        # The class need not look at the stored row.
        stored = given.stored
        if stored and self._sampling is not None:
            stored = stored.answered(item.sequence.token_ids[given.token_ids.size :])
            if stored.token_ids.size > self._header.max_length:
                found = f"{stored.token_ids.size} tokens in the stored row"
                raise self._invalid(where, found, f"at most {self._header.max_length}")
        # A class may build its sequences itself, and add to them.
        metadata = {**given.metadata, **item.sequence.metadata}
        item = item._replace(sequence=replace(item.sequence, stored=stored, metadata=metadata))
        self._check_arrays(where, item)
        if _is_nan(item.targets):
            return non_finite(item.sequence.sample_id, item.sequence.source_row)
        try:
            item.row.check(token_count=self._header.token_count)
        except (InvalidRow, InvalidTargets) as error:
            raise self._invalid(f"{where}: {error.what}", error.found, error.wanted) from error
        return item

    def _check_given(self, where: str, sequence: TokenSequence, given: TokenSequence) -> None:
        is_same = sequence is given or (
            sequence.sample_id == given.sample_id
            and sequence.source_row == given.source_row
            and np.array_equal(sequence.token_ids, given.token_ids)
            and np.array_equal(sequence.target_spans, given.target_spans)
            and sequence.media == given.media
        )
        if not is_same:
            raise self._invalid(where, f"another sequence, {sequence.sample_id!r}", "the given one, in the given order")

    def _check_answer(
        self, where: str, sequence: TokenSequence, prompt: TokenSequence, *, number: int, answers: int
    ) -> None:
        name = answer_name(prompt.sample_id, number, answers=answers)
        if (sequence.sample_id, sequence.source_row) != (name, prompt.source_row):
            found = f"answer {sequence.sample_id!r} of source row {sequence.source_row}"
            raise self._invalid(where, found, f"answer {name!r} of source row {prompt.source_row}")
        if not isinstance(sequence.token_ids, np.ndarray) or sequence.token_ids.dtype != np.int32:
            raise self._invalid(f"{where}: token_ids", type(sequence.token_ids).__name__, "int32 [T]")
        first, size = prompt.token_ids.size, sequence.token_ids.size
        if not np.array_equal(sequence.token_ids[:first], prompt.token_ids):
            raise self._invalid(where, "an answer to another prompt", "the prompt's own tokens, then the answer's")
        if sequence.media != prompt.media:
            raise self._invalid(where, f"{len(sequence.media)} images", f"the {len(prompt.media)} of the prompt")
        if not first < size <= self._read_length:
            raise self._invalid(where, f"{size} tokens", f"{first + 1}..{self._read_length}")
        if not np.array_equal(sequence.target_spans, [[first - 1, size - 1]]):
            found = f"target spans {np.asarray(sequence.target_spans).tolist()}"
            raise self._invalid(where, found, f"[[{first - 1}, {size - 1}]], the tokens of the answer")
        if sequence.metadata.get("finish_reason") not in ("stop", "length"):
            found = f"finish_reason {sequence.metadata.get('finish_reason')!r} in the metadata"
            raise self._invalid(where, found, "stop or length")

    def _check_arrays(self, where: str, item: ScoredSequence) -> None:
        """Data types and shapes; the values are checked by the laws of a row."""
        targets, header = item.targets, self._header
        if not isinstance(targets, TeacherTargets):
            raise self._invalid(where, type(targets).__name__, "TeacherTargets")
        positions = (span_positions(item.sequence.target_spans).size,)
        wanted: dict[str, tuple[tuple[int, ...], type]] = {
            "ids": ((*positions, header.top_k), np.int32),
            "logprobs": ((*positions, header.top_k), np.float32),
            "counts": (positions, np.int32),
            "log_tail": (positions, np.float32),
            "label_logprob": (positions, np.float32),
            "draw_counts": (positions, np.int32),
            "draw_ids": ((np.size(targets.draw_ids),), np.int32),
        }
        if header.draw_logprobs:
            wanted["draw_logprobs"] = ((np.size(targets.draw_ids),), np.float32)
        elif targets.draw_logprobs is not None:
            raise self._invalid(f"{where}: draw_logprobs", "an array", "None: teacher.draw_logprobs is off")
        for name, (shape, dtype) in wanted.items():
            array = getattr(targets, name)
            if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
                found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                raise self._invalid(f"{where}: {name}", found, f"{np.dtype(dtype)} {shape}")
        if targets.draw_counts.size and targets.draw_counts.max() > header.kept_draws:
            found = f"{targets.draw_counts.max()} draws of a position"
            raise self._invalid(f"{where}: draw_counts", found, f"at most kept_draws, {header.kept_draws}")

    def _invalid(self, where: str, found: object, wanted: object) -> TeacherOutputInvalid:
        return TeacherOutputInvalid(
            f"{self._engine}: {where}",
            found=found,
            wanted=wanted,
            fix="compare with the docstring of `Teacher.score` in coldstill/pipeline/teachers/protocol.py",
        )


def _is_nan(targets: TeacherTargets) -> bool:
    """Whether best id, tail and label of a position are all NaN, as in a softmax with a NaN or infinite logit. A NaN in
    one of them is an error of the class."""
    bad = np.isnan(targets.logprobs[:, 0]) & np.isnan(targets.log_tail) & np.isnan(targets.label_logprob)
    return bool(bad.any())
