"""Chunks: the shortest runs of tokens that begin and end at the same byte on both sides.

Shape letters: `T` tokens of the teacher, `S` tokens of the student, `C` chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MAX_CHUNK_TOKENS = 64
"""Longer chunks are not used: their tokens share one number of the teacher, and the fused head keeps the logits of one
chunk in memory together."""


class Chunks(NamedTuple):
    """`borders int64 [C + 1]`: the bytes at which chunks begin and end. `of_teacher int64 [T]`, `of_student int64 [S]`:
    the chunk of each token, -1 before the first and behind the last border. Each chunk has at least one byte."""

    borders: np.ndarray
    of_teacher: np.ndarray
    of_student: np.ndarray

    @property
    def number(self) -> int:
        """C."""
        return max(0, self.borders.size - 1)


def align(
    teacher_starts: np.ndarray, teacher_ends: np.ndarray, student_starts: np.ndarray, student_ends: np.ndarray
) -> Chunks:
    """The chunks of two tokenizations of one text; starts and ends are bytes of it, `int64 [T]` and `[S]`.

    The tokens of each side follow each other without a gap; the two sides may cover different parts of the text. A
    token without bytes belongs to the chunk that ends there; before the first, to none.
    """
    if not teacher_ends.size or not student_ends.size:
        empty = np.empty(0, np.int64)
        return Chunks(empty, np.full(teacher_ends.size, -1), np.full(student_ends.size, -1))
    of_teacher = np.append(teacher_starts[:1], teacher_ends)
    borders = np.intersect1d(of_teacher, np.append(student_starts[:1], student_ends))
    return Chunks(borders, _chunk_of(borders, teacher_ends), _chunk_of(borders, student_ends))


def _chunk_of(borders: np.ndarray, ends: np.ndarray) -> np.ndarray:
    found = np.searchsorted(borders, ends, side="left") - 1
    return np.where(found < borders.size - 1, found, -1)
