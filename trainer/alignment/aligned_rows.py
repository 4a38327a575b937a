"""Writes a stored row in the student's tokens, and finds which of them follow from the teacher's targets.

A row of text is the text between special tokens; a chat is rendered by the student's own template, and its answers are
aligned one by one. A row that cannot be aligned is skipped, with a reason.

Shape letters: `S` tokens of the student, `N` stored target positions, `M` target positions of the student.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from coldstill.storage_schema.rows import CachedRow

from .chat_turns import ChatTurns, Turn
from .chunks import MAX_CHUNK_TOKENS, align
from .token_bytes import ByteText, TokenBytes


class Skipped(StrEnum):
    """Why a row is not used."""

    CHAT_NOT_RECOVERED = "its messages cannot be proven from its tokens and the teacher's chat template"
    CHAT_NOT_RENDERED = "the student's chat template fails or changes its messages"
    SPECIAL_TOKEN = "it has a special token in its text, or text that is one for the student"
    NO_TEXT = "it has no text"
    NOT_UTF8 = "its tokens are not text in UTF-8"
    TEXT_CHANGED = "the student's tokenizer changes its text"
    TOO_LONG = "it has more tokens of the student than the student's context"
    IMAGES = "it has images"


class RowSkipped(Exception):
    """Ends the alignment of a row."""

    def __init__(self, reason: Skipped):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class AlignedRow:
    """A row as the student reads it.

    `token_ids int64 [S]`. `positions int64 [M]`: target positions, ascending; position t is followed by a token that
    the teacher's targets cover whole. `chunk int64 [M]`: the number of the chunk of that token, ascending from 0; -1 if
    the token is lost. `chunk_logprob float64 [M]`: the teacher's log-prob of that chunk. `source int64 [M]`: the stored
    target, of `N`, at the first token of a chunk that is one token of the teacher; -1 elsewhere.
    `byte_counts int64 [M]`: bytes of text of the token.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    chunk: np.ndarray
    chunk_logprob: np.ndarray
    source: np.ndarray
    byte_counts: np.ndarray

    @classmethod
    def empty(cls, token: int) -> AlignedRow:
        """A row of one token without targets, in the place of one that was skipped."""
        none = np.empty(0, np.int64)
        return cls(np.array([token]), none, none, np.empty(0), none, none)


class _Span(NamedTuple):
    """Tokens of both sides that write the same text: numbers `teacher` and `student`, and the byte of each side's text
    at which that text begins, so that offsets agree after it is taken off. `of_message`: the first token of a side may
    begin before that, with a space of the template."""

    teacher: np.ndarray
    student: np.ndarray
    teacher_start: int
    student_start: int
    of_message: bool = False


class _Sides(NamedTuple):
    """Both tokenizations of a row, their common spans, and pairs of tokens with one role, `[P, 2]`."""

    student: ByteText
    spans: list[_Span]
    pairs: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class RowAligner:
    """Aligns rows. Threads may share it, and it can be pickled.

    `teacher_chat`, `student_chat`: for rows that are chats; None for rows of text. `begin`: the teacher's id at the
    begin of a text, if any; `begins`: ids that the student's own tokenizer puts there instead. `roles`: the student's
    id of each special token of the teacher that may stand elsewhere, None to leave it out. `context`: most tokens of a
    row.
    """

    teacher: TokenBytes
    student: TokenBytes
    teacher_chat: ChatTurns | None
    student_chat: ChatTurns | None
    begin: int | None
    begins: tuple[int, ...]
    roles: dict[int, int | None]
    context: int | None

    def align(self, row: CachedRow) -> AlignedRow:
        """Raises `RowSkipped`."""
        if row.media:
            raise RowSkipped(Skipped.IMAGES)
        stored = self.teacher.read(row.token_ids)
        sides = self._text(stored) if self.teacher_chat is None else self._chat(stored)
        if self.context is not None and sides.student.ids.size > self.context:
            raise RowSkipped(Skipped.TOO_LONG)
        return _aligned(row, stored, sides)

    def _text(self, stored: ByteText) -> _Sides:
        ids: list[int] = list(self.begins)
        sizes = [0] * len(ids)
        spans: list[_Span] = []
        pairs: list[tuple[int, int]] = []
        for place, numbers in self._runs(stored):
            if numbers.size == 0:
                special = int(stored.ids[place])
                if place == 0 and special == self.begin:
                    continue
                if special not in self.roles:
                    raise RowSkipped(Skipped.SPECIAL_TOKEN)
                image = self.roles[special]
                if image is not None:
                    pairs.append((place, len(ids)))
                    ids.append(image)
                    sizes.append(0)
                continue
            first, last = stored.starts[numbers[0]], stored.ends[numbers[-1]]
            start, text = _whole_characters(stored.text[first:last])
            written = self.student.encode(text)
            if written.text != text.encode() or self.student.special[written.ids].any():
                raise RowSkipped(Skipped.TEXT_CHANGED)
            spans.append(_Span(numbers, len(ids) + np.arange(written.ids.size), int(first) + start, sum(sizes)))
            ids += written.ids.tolist()
            sizes += np.diff(written.ends, prepend=0).tolist()
        if not spans:
            raise RowSkipped(Skipped.NO_TEXT)
        student = ByteText(np.array(ids, np.int64), b"", np.cumsum(sizes, dtype=np.int64))
        return _Sides(student, spans, pairs)

    def _runs(self, stored: ByteText) -> Iterator[tuple[int, np.ndarray]]:
        """The place of each special token, and runs of other tokens, in order."""
        special = self.teacher.special[stored.ids]
        borders = np.flatnonzero(np.diff(special.astype(np.int8))) + 1
        for numbers in np.split(np.arange(stored.ids.size), borders):
            if numbers.size and special[numbers[0]]:
                for place in numbers.tolist():
                    yield place, numbers[:0]
            elif numbers.size:
                yield int(numbers[0]), numbers

    def _chat(self, stored: ByteText) -> _Sides:
        assert self.teacher_chat is not None
        assert self.student_chat is not None
        found = self.teacher_chat.messages(stored)
        if found is None:
            raise RowSkipped(Skipped.CHAT_NOT_RECOVERED)
        messages, turns = found
        try:
            student = self.student_chat.render(messages)
            splits = self.student_chat.turns(student.text)
        except Exception:  # the template is a program
            raise RowSkipped(Skipped.CHAT_NOT_RENDERED) from None
        wanted = [(message["role"], message["content"].encode()) for message in messages]
        theirs = next(
            (
                split
                for split in splits
                if [(turn.role, student.text[turn.start : turn.stop]) for turn in split] == wanted
            ),
            None,
        )
        if theirs is None:
            raise RowSkipped(Skipped.CHAT_NOT_RENDERED)
        spans, pairs = [], []
        for turn, other in zip(turns, theirs, strict=True):
            # Text such as `<|im_end|>` may be a special token of one side and ordinary tokens of the other.
            mine = self.teacher.specials_in(stored, turn.start, turn.stop)
            image = self.student.specials_in(student, other.start, other.stop)
            if [place[:2] for place in mine] != [place[:2] for place in image]:
                raise RowSkipped(Skipped.SPECIAL_TOKEN)
            if turn.role != "assistant":
                continue
            numbers = [_tokens_of(side, one) for side, one in ((stored, turn), (student, other))]
            spans.append(_Span(numbers[0], numbers[1], turn.start, other.start, of_message=True))
            end = self.teacher_chat.place_behind(stored, turn.stop)
            their_end = self.student_chat.place_behind(student, other.stop)
            if end is not None and their_end is not None:
                pairs.append((end, their_end))
        return _Sides(student, spans, pairs)


def _aligned(row: CachedRow, stored: ByteText, sides: _Sides) -> AlignedRow:
    student = sides.student
    target_of = np.full(stored.ids.size, -1, np.int64)
    target_of[row.positions + 1] = np.arange(row.positions.size)
    chunk, source = np.full((2, student.ids.size), -1, np.int64)
    logprob = np.zeros(student.ids.size)
    covered = np.zeros(student.ids.size, bool)
    chunks = 0
    labels = row.targets.label_logprob.astype(np.float64)
    sizes = student.ends - student.starts
    for span in sides.spans:
        of_teacher = _places(stored, span.teacher, span.teacher_start)
        of_student = _places(student, span.student, span.student_start)
        if span.of_message:
            of_teacher, of_student = (of_teacher[0].clip(0), of_teacher[1]), (of_student[0].clip(0), of_student[1])
            sizes[span.student] = of_student[1] - of_student[0]
        found = align(*of_teacher, *of_student)
        covered[span.student] = _covered(*of_teacher, target_of[span.teacher] >= 0, *of_student)
        if not found.number:
            continue
        inside, theirs = found.of_teacher >= 0, found.of_student >= 0
        targets = target_of[span.teacher[inside]]
        counts = [np.bincount(side[side >= 0], minlength=found.number) for side in (found.of_teacher, found.of_student)]
        known = np.bincount(found.of_teacher[inside], targets >= 0, minlength=found.number) == counts[0]
        # The first token of a row is predicted by nothing.
        predicted = span.student[theirs] > 0
        known &= np.bincount(found.of_student[theirs], predicted, minlength=found.number) == counts[1]
        known &= (counts[0] > 0) & (counts[1] > 0) & (counts[1] <= MAX_CHUNK_TOKENS)
        total = np.bincount(
            found.of_teacher[inside], np.where(targets >= 0, labels[targets], 0), minlength=found.number
        )
        first = np.full(found.number, -1, np.int64)
        first[found.of_teacher[inside][::-1]] = targets[::-1]
        single = known & (counts[0] == 1)
        numbers, each = span.student[theirs], found.of_student[theirs]
        begins = np.diff(each, prepend=-1) > 0
        chunk[numbers] = np.where(known[each], chunks + each, -1)
        logprob[numbers] = np.where(known[each], total[each], 0)
        source[numbers] = np.where(single[each] & begins, first[each], -1)
        chunks += found.number
    for teacher_place, place in sides.pairs:
        if place > 0 and target_of[teacher_place] >= 0:
            covered[place], chunk[place], sizes[place] = True, chunks, 0
            source[place] = target_of[teacher_place]
            logprob[place] = labels[source[place]]
            chunks += 1
    covered |= chunk >= 0
    covered[0] = False
    tokens = np.flatnonzero(covered)
    return AlignedRow(
        token_ids=student.ids,
        positions=tokens - 1,
        chunk=_in_order(chunk[tokens]),
        chunk_logprob=logprob[tokens],
        source=source[tokens],
        byte_counts=sizes[tokens],
    )


def _tokens_of(side: ByteText, turn: Turn) -> np.ndarray:
    """The tokens of a message. The first may hold spaces of the template, as ` The` of `[/INST] The`: they are fixed by
    the template, so that token and `The` of the other side are one event."""
    inside = (side.starts >= turn.start) & (side.ends <= turn.stop)
    first = int(np.searchsorted(side.ends, turn.start, side="right"))
    if first < side.ids.size and side.starts[first] < turn.start and side.ends[first] <= turn.stop:
        inside[first] = side.text[side.starts[first] : turn.start].isspace()
    return np.flatnonzero(inside)


def _places(side: ByteText, numbers: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes at which tokens begin and end, counted from `start`."""
    return side.starts[numbers] - start, side.ends[numbers] - start


def _covered(
    teacher_starts: np.ndarray,
    teacher_ends: np.ndarray,
    is_target: np.ndarray,
    student_starts: np.ndarray,
    student_ends: np.ndarray,
) -> np.ndarray:
    """`bool [S]`: whether all bytes of a student's token are of targets."""
    size = max(teacher_ends[-1:].max(initial=0), student_ends[-1:].max(initial=0))
    of_target = np.zeros(size + 2, np.int64)
    for start, stop in zip(teacher_starts[is_target].clip(0), teacher_ends[is_target].clip(0), strict=True):
        of_target[start:stop] = 1
    total = np.concatenate(([0], np.cumsum(of_target)))
    count = student_ends - student_starts
    return (total[student_ends.clip(0)] - total[student_starts.clip(0)] == count) & (count > 0) & (student_starts >= 0)


def _in_order(chunk: np.ndarray) -> np.ndarray:
    """Numbers from 0 on, in the order of the tokens; -1 stays."""
    used = chunk >= 0
    steps = np.diff(chunk[used], prepend=-1) != 0
    ordered = np.full(chunk.size, -1, np.int64)
    ordered[used] = np.cumsum(steps) - 1
    return ordered


def _whole_characters(text: bytes) -> tuple[int, str]:
    """The text without the parts of characters at its ends, and how many bytes were left out at the start: a row that
    was split or cut may begin or end within a character. Raises `RowSkipped`."""
    start = next((n for n, byte in enumerate(text[:4]) if byte & 0xC0 != 0x80), 0)
    try:
        return start, text[start:].decode()
    except UnicodeDecodeError as error:
        if len(text) - start - error.start > 3 or error.reason != "unexpected end of data":
            raise RowSkipped(Skipped.NOT_UTF8) from None
        return start, text[start : start + error.start].decode()
