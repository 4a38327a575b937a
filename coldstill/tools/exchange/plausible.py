"""Is what an import is about to write what the user says it is? The first rows in, nothing or a named error out.

Both errors are silent otherwise: a row of log-probs taken for its neighbour trains a student to repeat or to skip
tokens, and log-probs that were scaled to sum to 1 over the kept ids claim a teacher without a tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from coldstill.storage_schema.rows import CachedRow

from .derive import MIN_TAIL
from .errors import AlignmentDoubtful, NotFullSoftmax

SAMPLE_ROWS = 32
MIN_POSITIONS = 256
"""Fewer positions than this cannot tell chance from a wrong alignment."""

OPEN_PROBABILITY = 1e-5
"""A position whose LEAST kept id has more than this has a tail well above `MIN_TAIL` in any full softmax."""


def check_alignment(rows: Iterable[CachedRow], *, fix: str) -> None:
    """Raise `AlignmentDoubtful` where kept ids hold token `t` or `t + 2` far more often than token `t + 1`.

    On real text a teacher's top 50 hold the token that follows at about 95 % of the positions, and its neighbours at a
    fifth of that or less; the error is raised where a neighbour is found 1.5 times as often.
    """
    hits = np.zeros(3, np.int64)
    total = 0
    for row in rows:
        positions = row.positions
        inner = positions < row.token_ids.size - 2
        ids, kept = row.targets.ids[inner], row.targets.kept[inner]
        total += int(inner.sum())
        for offset in range(3):
            token = row.token_ids[positions[inner] + offset]
            hits[offset] += int(((ids == token[:, None]) & kept).any(axis=1).sum())
    best = int(hits.argmax())
    if total >= MIN_POSITIONS and best != 1 and hits[best] > 1.5 * hits[1] + 0.05 * total:
        said = f"{hits[1] / total:.0%} of the positions hold the token that follows"
        raise AlignmentDoubtful(
            "alignment",
            found=f"{said}, {hits[best] / total:.0%} hold {('the token itself', '', 'the token after it')[best]}",
            wanted="distributions of the token that follows",
            fix=fix,
        )


def check_not_renormalised(rows: Sequence[CachedRow], *, token_count: int, fix: str) -> None:
    """Raise `NotFullSoftmax` where no position has a tail although its least kept id has a probability to speak of."""
    least = np.concatenate(
        [np.where(row.targets.kept, row.targets.logprobs, np.inf).min(axis=1, initial=np.inf) for row in rows]
    )
    log_tail = np.concatenate([row.targets.log_tail for row in rows])
    counts = np.concatenate([row.targets.counts for row in rows])
    is_open = (least > np.log(OPEN_PROBABILITY)) & (counts < token_count)
    if is_open.any() and (log_tail[is_open] < np.log(3 * MIN_TAIL)).all():
        raise NotFullSoftmax(
            "log-probs",
            found=f"a sum of 1 over the kept ids at each of {int(is_open.sum())} positions",
            wanted="log-probs of the full softmax, whose sum over the kept ids is below 1",
            fix=fix,
        )
