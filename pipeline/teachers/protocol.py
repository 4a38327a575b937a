"""The `Teacher` protocol: adds the teacher's distributions to token sequences.

Your own class can be an engine too: `teacher.engine: my_module:MyTeacher`. `examples/custom_teacher.py` is one.
Shape letters: `T` tokens, `n` spans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.storage_schema.rows import CachedRow, MediaReference, TeacherTargets

TEACHER_TOKENS = "teacher_tokens"
"""Key in the metadata of a row: the number of tokens that the teacher read, where its prompt was not the row's."""


class StoredRow(NamedTuple):
    """A row as it is stored, where the teacher reads another prompt: the fields of `TokenSequence` of these names.

    Its spans are as many and as long as the sequence's, and have the same labels.
    """

    token_ids: np.ndarray
    target_spans: np.ndarray
    media: tuple[MediaReference, ...] = ()

    def answered(self, tokens: Sequence[int] | np.ndarray) -> StoredRow:
        """A prompt with the tokens of an answer to it, all of them targets."""
        first = self.token_ids.size
        return StoredRow(
            np.concatenate([self.token_ids, np.asarray(tokens, np.int32)]),
            np.array([[first - 1, first + len(tokens) - 1]], np.int32),
            self.media,
        )


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """`token_ids int32 [T]`, and the positions to score as `target_spans int32 [n, 2]`; a prompt has no spans.

    These are what the teacher reads. `stored` is the row of the dataset if that has another prompt.

    `source_row` is the number of the source row that it was made from; of joined documents, the first one's. `media`
    are its images with their content; each has ONE placeholder token in `token_ids`. `score_ids int32 [1 or N, M]`: ids
    that the source names for all targets or for each of the `N`, -1 where fewer; they are kept beside the top K.
    """

    sample_id: str
    source_row: int
    token_ids: np.ndarray
    target_spans: np.ndarray
    metadata: Mapping[str, Any] = field(default_factory=dict)
    media: tuple[MediaReference, ...] = ()
    score_ids: np.ndarray | None = None
    stored: StoredRow | None = None

    @property
    def as_stored(self) -> StoredRow:
        """The row of the dataset."""
        return self.stored or StoredRow(self.token_ids, self.target_spans, self.media)


class ScoredSequence(NamedTuple):
    """A sequence with the teacher's distributions at its target positions."""

    sequence: TokenSequence
    targets: TeacherTargets

    @property
    def row(self) -> CachedRow:
        """The dataset row. Where the teacher read another prompt, the metadata say how many tokens it read."""
        sequence, stored = self.sequence, self.sequence.as_stored
        read = {TEACHER_TOKENS: int(sequence.token_ids.size)} if sequence.stored else {}
        return CachedRow(
            sample_id=sequence.sample_id,
            token_ids=stored.token_ids,
            target_spans=stored.target_spans,
            targets=self.targets,
            metadata={**sequence.metadata, **read},
            media=stored.media,
        )


class UnscoredSequence(NamedTuple):
    """A sequence (in mode generate, an answer's prompt) without distributions: the capture rejects its row.

    `sample_id` is that of the sequence or answer. `detail` becomes part of the dataset: equal rows have equal details.
    """

    sample_id: str
    source_row: int
    reason: RejectReason
    detail: str


def non_finite(sample_id: str, source_row: int) -> UnscoredSequence:
    """A sequence with NaN or infinite logits.

    The detail names no position: a NaN spreads to other positions of its row by the blocks of the attention, which
    depend on the schedule.
    """
    return UnscoredSequence(sample_id, source_row, RejectReason.NON_FINITE_LOGITS, "NaN or infinity")


ScoreResult = ScoredSequence | UnscoredSequence


def scored_of(results: Iterable[ScoreResult]) -> list[ScoredSequence]:
    """The results that have distributions."""
    return [result for result in results if isinstance(result, ScoredSequence)]


class Teacher(Protocol):
    """A loaded engine. Subclass it for the defaults; then you must write `score` only.

    `teacher.engine: my_module:MyTeacher` constructs the class in each worker as
    `MyTeacher(config, header, sampling=None)`:

    - `config: TeacherConfig`: the settings of section `teacher`. `config.model` is always a model folder or hub name
      with a tokenizer and a `config.json`, which the header is made from. `config.engine_args` is free for your own.
    - `header: DatasetHeader`: what is recorded. `top_k`, `min_prob`, `kept_draws` and `token_count` determine what
      the targets hold, `teacher.head_dtype` is the data type of the logits.
    - `sampling: SamplingConfig | None`: how to sample answers, in mode generate; otherwise None.

    The class attribute `tail` becomes the header's `tail`; a class without one is `"derived"`. `"exact"`: `log_tail` is
    the log of the summed mass of all entries outside the kept ids, and the engine can draw (`teacher.draws` above 0).
    `"derived"`: `log_tail` is log(max(1 - sum of kept, 1e-6)), without draws. The class attribute `draw_method` becomes
    `teacher.draw_method` and the header's; a class without one is `"iid"`: of D independent draws from the softmax, the
    targets have those outside the kept ids. `"systematic"`: what `target_extractor.summarize` makes with
    `systematic_draws`.

    With `order: fast` calls may overlap in several threads; with `order: exact` the caller makes one call at a time.
    A named error (a `ColdstillError`) fails the work unit. Any other exception ends the worker, as a crash would, and
    the unit is tried again on a new one.
    """

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware, as JSON values, for the commit records."""
        return {}

    @property
    def progress(self) -> int:
        """A number that grows while a call makes progress. Never blocks.

        The watchdog ends a worker whose call shows no progress for `cluster.hung_after_s`. With the default, a
        constant, that is the longest time that a call may take.
        """
        return 0

    @property
    def processes(self) -> tuple[int, ...]:
        """Ids of processes that calls depend on, besides the caller's own. They are ended with the worker."""
        return ()

    def score(self, sequences: Sequence[TokenSequence]) -> Sequence[ScoreResult]:
        """A list: sequences with the teacher's distributions at their target positions, in the order given.

        Made without sampling: the given sequences themselves, teacher-forced.

        Made with sampling: `sequences` are prompts, without target spans, and the result is `sampling.n` answers to
        each, one after the other. An answer is a sequence of prompt and answer with the answer's tokens as targets,
        and with `finish_reason` (`stop` or `length`) in its metadata, as `sampling.answer_sequence` makes it; the
        sample id of answer `i` of several is `ID#i`. The log-probs are those of the untempered softmax.

        Target position `t` holds the distribution of token `t + 1` given tokens `0..t`. `TeacherTargets`
        (storage_schema/rows.py) documents the arrays; `target_extractor.summarize` makes them from logits.

        A sequence that gives NaN or infinite logits has an `UnscoredSequence` in its place, as `non_finite` makes it;
        its row is rejected, and the others are stored. The same is done with the targets that `summarize` makes of such
        logits.

        All sequences are queued before the first is computed: equal calls give equal bits on equal hardware.
        A sequence with `media` has one placeholder token for each image. An engine shows the model
        `images.decoded(medium.data, ...)`, expands the placeholders, and takes the targets at the positions that
        `image_expansion.ImageRules` proves; a sequence without such a proof is an `UnscoredSequence`.

        A sequence has at most `config.read_length` tokens. Where the teacher reads another prompt than the row's, the
        sequence is what the teacher reads, and an engine need not look at its `stored` row. Draws depend on the
        positions of `sequence.as_stored`.

        Raises `TeacherOutputInvalid`.
        """
        ...


def answer_name(sample_id: str, number: int, *, answers: int) -> str:
    """Sample id of answer `number` of `answers` to a prompt."""
    return sample_id if answers == 1 else f"{sample_id}#{number}"
