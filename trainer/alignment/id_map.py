"""Which id of the student begins its writing of the bytes of a teacher's id.

An id of the student is followed by more text: where the teacher predicts ` house` and the student writes ` ho`, `use`,
the teacher's mass of ` house` is mass of the student's next token ` ho`. Without it, ` ho` would be taught the
teacher's mass of the token ` ho` alone, which is that of other words.

Made at the start of a run, so it is not stored: 20 microseconds for each id whose bytes are no token of the student.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .token_bytes import TokenBytes


def map_ids(teacher: TokenBytes, student: TokenBytes, *, by_role: Mapping[int, int]) -> np.ndarray:
    """`int64 [V]`: for each of the teacher's ids the first of the student's tokens that write its bytes; -1 if none.

    That is the student's id of the same bytes, if there is one; several ids of the teacher may have one image. Special
    tokens stand for no text: only those of `by_role` (teacher's id to student's id) are mapped, and their images are of
    no other id. Of several ids of the same bytes only the one that a tokenizer writes itself counts, not a byte
    fallback such as `<0x41>`.
    """
    of_teacher, of_student = _by_bytes(teacher), _by_bytes(student)
    found = np.full(teacher.count, -1, np.int64)
    for text, id_ in of_teacher.items():
        found[id_] = of_student.get(text, -1)
    split = [text for text in of_teacher if text not in of_student]
    found[[of_teacher[text] for text in split]] = student.first_ids(split)
    taken: set[int] = set()
    for id_, image in by_role.items():
        if image not in taken:
            found[found == image] = -1
            found[id_] = image
            taken.add(image)
    return found


def _by_bytes(tokens: TokenBytes) -> dict[bytes, int]:
    ordinary = [id_ for id_ in np.flatnonzero(~tokens.special).tolist() if tokens.of_id[id_]]
    # Later entries replace earlier ones: fallbacks come first, and of the others the lowest id comes last.
    ordinary.sort(key=lambda id_: (not tokens.fallback[id_], -id_))
    return {tokens.of_id[id_]: id_ for id_ in ordinary}
