"""Which id of the student writes the same bytes as an id of the teacher.

Made at the start of a run: a quarter of a second for 128,256 and 151,936 ids, so it is not stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .token_bytes import TokenBytes


def map_ids(teacher: TokenBytes, student: TokenBytes, *, by_role: Mapping[int, int]) -> np.ndarray:
    """`int64 [V]`: for each of the teacher's ids the student's id of the same bytes, -1 if there is none.

    Special tokens stand for no text: only those of `by_role` (teacher's id to student's id) are mapped. No two ids have
    one image. Of several ids of the same bytes the one that a tokenizer writes itself counts, not a byte fallback such
    as `<0x41>`.
    """
    of_teacher, of_student = _by_bytes(teacher), _by_bytes(student)
    found = np.full(teacher.count, -1, np.int64)
    for text, id_ in of_teacher.items():
        found[id_] = of_student.get(text, -1)
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
