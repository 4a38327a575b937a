"""Ids that a source column names: their lists per row or target, and their bounds.

Shape letters: `N` target positions of a row, `M` most ids that are named at one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coldstill.storage_schema.codec.row_codec import MAX_ENTRIES

UNUSED = -1
"""Fills lists that are shorter than the longest one."""


class BadScoreIds(ValueError):
    """A row's ids cannot be used; the text says why, for its reject."""


def read_score_ids(value: object, *, targets: int, token_count: int, most: int, width: int) -> np.ndarray:
    """`int32 [1 or N, M]`, `UNUSED` where a list is shorter: one list for all targets of the row, or one for each.

    `value`: the column's value, `[id, ...]` or `[[id, ...], ...]` with one list for each of the row's `targets`. A
    repeated id counts once. Raises `BadScoreIds` for anything else, for an id that is not below `token_count`, for more
    than `most` ids, and for `targets` of `width` entries that exceed what a row may store.
    """
    if not isinstance(value, list | tuple | np.ndarray):
        raise BadScoreIds(f"{type(value).__name__}, not a list of token ids")
    items = list(value)
    nested = [isinstance(item, list | tuple | np.ndarray) for item in items]
    if any(nested) and len(items) != targets:
        raise BadScoreIds(f"{len(items)} lists of ids for {targets} target tokens")
    if any(nested) and not all(nested):
        raise BadScoreIds("ids and lists of ids together, not one kind of them")
    lists = [_distinct(item, token_count) for item in (items if any(nested) else [items])]
    longest = max((len(ids) for ids in lists), default=0)
    if longest > most:
        raise BadScoreIds(f"{longest} ids at one target, at most source.max_score_ids, {most}")
    if targets * width > MAX_ENTRIES:
        raise BadScoreIds(f"{targets:,} targets of {width:,} kept ids, at most {MAX_ENTRIES:,} in a row")
    return padded(lists, longest)


def _distinct(ids: Sequence[object], token_count: int) -> list[int]:
    found: dict[int, None] = {}
    for id_ in ids:
        if not isinstance(id_, int | np.integer) or isinstance(id_, bool):
            raise BadScoreIds(f"{str(id_)[:40]!r} among the ids, not an integer")
        if not 0 <= id_ < token_count:
            raise BadScoreIds(f"id {id_}, not one of 0..{token_count - 1}")
        found[int(id_)] = None
    return list(found)


def padded(lists: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """`int32 [lists, width]` of these lists, `UNUSED` after the end of each."""
    filled = np.full((len(lists), width), UNUSED, np.int32)
    for row, ids in zip(filled, lists, strict=True):
        row[: len(ids)] = ids
    return filled


def ids_of_part(score_ids: np.ndarray, loss_mask: Sequence[bool], start: int, stop: int) -> np.ndarray:
    """The ids of the tokens `start..stop` of a row, which become a row of their own.

    `score_ids int32 [1 or N, M]` belongs to the row's targets, which are its learned tokens from the second on. The
    first token of a part is no target: nothing of the part precedes it.
    """
    if len(score_ids) == 1:
        return score_ids
    targets = 1 + np.flatnonzero(np.asarray(loss_mask[1:], bool))
    return score_ids[(targets > start) & (targets < stop)]


def rows_at(score_ids: np.ndarray, part: slice, positions: int) -> np.ndarray:
    """`int32 [n, M]`: the ids of the targets `part` out of `positions`."""
    return np.broadcast_to(score_ids, (positions, score_ids.shape[1]))[part]
