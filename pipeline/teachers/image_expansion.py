"""Maps positions of stored rows to those of an engine that expands images.

A stored row has one placeholder token for each image, and an engine computes many tokens in its place. Each row's
expansion is proven: with one placeholder in place of each image's tokens, the engine's token ids are the stored ones.
A row without a proof is rejected by name. This is the only file that maps positions, for all engines.

Shape letters: `T` stored tokens, `E` expanded tokens, `P` images, `N` positions, `n` spans.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from coldstill.common.errors import ColdstillError, type_and_line
from coldstill.common.images import ImageTooLarge, ImageUnreadable, ImageUnsupported, decoded
from coldstill.common.processor import expanded_positions, placeholder_id
from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.storage_schema.rows import span_positions

from .protocol import ScoreResult, TokenSequence, UnscoredSequence, answer_name

if TYPE_CHECKING:
    from PIL import Image

_REASONS: dict[type[ColdstillError], RejectReason] = {
    ImageUnreadable: RejectReason.IMAGE_UNREADABLE,
    ImageUnsupported: RejectReason.IMAGE_UNSUPPORTED,
    ImageTooLarge: RejectReason.IMAGE_TOO_LARGE,
}

PROCESSOR_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ColdstillError)
"""What a processor raises for an image that it cannot read, besides errors of the machine."""
_OF_ONE_MACHINE = re.compile(r"0x[0-9a-f]+|(?:[A-Za-z]:)?(?:[\\/][\w.@+-]+){2,}")
"""Addresses of memory, and paths."""


class RowRejected(Exception):
    """The row cannot be scored. `detail` becomes part of the dataset: equal rows have equal details."""

    def __init__(self, reason: RejectReason, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail

    def of(self, sequence: TokenSequence) -> UnscoredSequence:
        """What an engine returns in place of the row, or of one answer to it."""
        return UnscoredSequence(sequence.sample_id, sequence.source_row, self.reason, self.detail)

    def of_answers(self, prompt: TokenSequence, answers: int) -> list[ScoreResult]:
        """What an engine returns in place of all answers to a prompt."""
        names = [answer_name(prompt.sample_id, number, answers=answers) for number in range(answers)]
        return [self.of(replace(prompt, sample_id=name)) for name in names]


class Expansion(NamedTuple):
    """A row as an engine computes it: `token_ids int64 [E]`; its images are at `images int64 [P]` in the stored row and
    have `lengths int64 [P]` tokens each."""

    token_ids: np.ndarray
    images: np.ndarray
    lengths: np.ndarray

    def positions(self, stored: np.ndarray) -> np.ndarray:
        """`int64 [N]`: the engine's positions of these stored ones."""
        return expanded_positions(stored, images=self.images, lengths=self.lengths)

    def spans(self, stored: np.ndarray) -> list[list[int]]:
        """The engine's positions of target spans `int32 [n, 2]`. A span has no image inside, so it keeps its length."""
        starts = self.positions(stored[:, 0])
        return np.column_stack([starts, starts + stored[:, 1] - stored[:, 0]]).tolist()


def as_stored(sequence: TokenSequence) -> Expansion:
    """The expansion of a row without images."""
    nothing = np.empty(0, np.int64)
    return Expansion(sequence.token_ids.astype(np.int64), nothing, nothing)


class ImageRules:
    """What one teacher's rows with images must satisfy. All methods raise `RowRejected`."""

    def __init__(self, processor: Any, *, max_images: int):
        """`processor`: of transformers. Raises `ProcessorUnusable` for one without a placeholder token."""
        self.placeholder_id = placeholder_id(processor)
        patches = {id_ for id_ in getattr(processor, "image_token_ids", ()) if isinstance(id_, int)}
        self.reserved = frozenset({self.placeholder_id, *patches})
        """Token ids that no text of a row may have: the engine would read them as images."""
        self._max_images = max_images

    def check_row(self, sequence: TokenSequence) -> None:
        """Check that placeholders and images of the stored row match, and that no target predicts a placeholder."""
        images = np.array([medium.position for medium in sequence.media], np.int64)
        found = np.flatnonzero(sequence.token_ids == self.placeholder_id)
        if not np.array_equal(found, images):
            raise _differs(f"{found.size} placeholders for {images.size} images, or at other positions")
        if self._reserved_in(sequence.token_ids) > images.size:
            raise _differs("text that holds a token of an image's patches")
        labels = sequence.token_ids[span_positions(sequence.target_spans) + 1]
        if (labels == self.placeholder_id).any():
            raise _differs("a placeholder as the label of a target")
        if images.size > self._max_images:
            raise RowRejected(RejectReason.TOO_MANY_IMAGES, f"{images.size} images, at most {self._max_images}")

    def check_answer(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Check that an answer holds no token that stands for an image."""
        if self._reserved_in(np.asarray(tokens)):
            raise _differs("an answer that holds a token of images")

    def proven(
        self, sequence: TokenSequence, token_ids: Sequence[int] | np.ndarray, ranges: Iterable[tuple[int, int]]
    ) -> Expansion:
        """The expansion, if `token_ids [E]` with one placeholder in place of each of `ranges` are the stored ids.

        `ranges`: offset and length of each image's tokens, wrappers included, in order.
        """
        expanded = np.asarray(token_ids, np.int64)
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        stop = 0
        for offset, length in ranges:
            if offset < stop or length < 1 or offset + length > expanded.size:
                raise _differs("ranges of images that overlap or lie outside of the row")
            parts += [expanded[stop:offset], np.array([self.placeholder_id])]
            lengths.append(length)
            stop = offset + length
        if len(lengths) != len(sequence.media):
            raise _differs(f"the engine expanded {len(lengths)} images of {len(sequence.media)}")
        contracted = np.concatenate([*parts, expanded[stop:]])
        if not np.array_equal(contracted, sequence.token_ids):
            raise _differs("the engine's tokens, with one placeholder for each image, are not the row's")
        images = np.array([medium.position for medium in sequence.media], np.int64)
        return Expansion(expanded, images, np.array(lengths, np.int64))

    def _reserved_in(self, token_ids: np.ndarray) -> int:
        return int(np.isin(token_ids, list(self.reserved)).sum())


def check_no_images(sequence: TokenSequence) -> None:
    """Raise `RowRejected` for a row with images of a teacher that sees none."""
    if sequence.media:
        raise _differs(f"{len(sequence.media)} images, and the dataset's header has no processor")


def check_length(sequence: TokenSequence, expansion: Expansion, *, config: TeacherConfig, is_prompt: bool) -> None:
    """Raise `RowRejected` for a row that is longer than `max_length` with its images expanded, or of which the teacher
    reads more than `max_read_length`.

    `is_prompt`: the row must leave room for an answer.
    """
    read, images = expansion.token_ids.size, expansion.images.size
    if not images:
        return  # the source's tokens were counted when they were made
    size = read + sequence.as_stored.token_ids.size - sequence.token_ids.size
    of_images = f"{int(expansion.lengths.sum())} of them of {images} images"
    if size > config.max_length - is_prompt:
        reason = RejectReason.NO_ROOM if is_prompt else RejectReason.OVER_LONG
        raise RowRejected(reason, f"{size} tokens, {of_images}; at most {config.max_length}")
    if read > config.read_length - is_prompt:
        detail = f"the teacher reads {read} tokens, {of_images}; at most {config.read_length}"
        raise RowRejected(RejectReason.TEACHER_OVER_LONG, detail)


def images_of(sequence: TokenSequence) -> list[Image.Image]:
    """The images that the model is shown. Raises `RowRejected`."""
    shown = []
    for number, medium in enumerate(sequence.media):
        where = f"image {number}"
        try:
            if medium.data is None:
                raise _differs(f"{where} without its content")
            shown.append(decoded(medium.data, where=where))
        except (ImageUnreadable, ImageUnsupported, ImageTooLarge) as error:
            raise RowRejected(_REASONS[type(error)], f"{where}: {error.found}") from None
    return shown


def unsupported(error: Exception) -> RowRejected:
    """The rejection of a row whose images the teacher's own processor refuses, for example for their aspect ratio."""
    found = error.found if isinstance(error, ColdstillError) else type_and_line(error)
    text = _OF_ONE_MACHINE.sub("...", str(found))[:200]
    return RowRejected(RejectReason.IMAGE_UNSUPPORTED, f"the teacher's processor refuses the images: {text}")


def _differs(detail: str) -> RowRejected:
    return RowRejected(RejectReason.PLACEHOLDERS_DIFFER, detail)
