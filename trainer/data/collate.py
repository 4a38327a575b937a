"""Collates decoded rows, single or packed, into the batch of tensors that the trainer uses.

Shape letters: `B` packs (or rows, without packing), `T` tokens of a pack, `M` target positions of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from coldstill.storage_schema.rows import CachedRow
from coldstill.trainer.targets import SparseTargets, joined

from .images import ReadRow, ReadRows
from .subsample import with_smaller_top_k

IGNORED = -100
"""Label of a position that is not a target: the value that transformers ignores everywhere."""


def collate(rows: Sequence[CachedRow], *, top_k: int | None = None, read: ReadRows | None = None) -> dict[str, Any]:
    """`B` rows, padded on the right to the longest.

    The batch of `collate_packs`, and `attention_mask int64 [B, T]`: 1 at tokens, 0 at padding. With `read`, what a
    student that sees images reads of `rows`, also `images`, the inputs of the images, `token_types int64 [B, T]`: 1 at
    patches of images, and `stored_positions int64 [M]`: the position of each target in its stored row.
    """
    as_read = _as_stored(rows) if read is None else list(read.rows)
    length = max(row.token_ids.size for row in as_read)
    batch = collate_packs([[row] for row in rows], length=length, top_k=top_k, as_read=as_read)
    lengths = torch.tensor([row.token_ids.size for row in as_read])
    batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    if read is not None:
        types = np.zeros((len(rows), length), np.int64)
        for b, of_row in enumerate(read.types):
            types[b, : of_row.size] = of_row
        stored = torch.from_numpy(np.concatenate([row.positions for row in rows]))
        batch |= {"images": read.images, "token_types": torch.from_numpy(types), "stored_positions": stored}
    return batch


def collate_packs(
    packs: Sequence[Sequence[CachedRow]],
    *,
    length: int,
    top_k: int | None = None,
    as_read: Sequence[ReadRow] | None = None,
) -> dict[str, Any]:
    """`B` packs of `T = length` tokens, each the tokens of its rows in order, padded on the right.

    `as_read`: the tokens and target positions of all rows in order, if a student reads others than the stored ones.

    - `input_ids`, `position_ids` `int64 [B, T]`. Positions restart at 0 in each row and in the padding: without a mask,
      transformers derives from them which tokens attend to each other (only with `use_cache=False`). In long padding
      they restart again: a student's table of positions may end soon after the longest row.
    - `labels int64 [B, T]`: token `t + 1` at a target position `t` of a row, so they are already aligned and must not
      be shifted; `IGNORED` elsewhere.
    - `targets`: `SparseTargets` of the `M` positions, reduced to the `top_k` most probable ids if given.
    - `sample_ids`: a name per row; `target_samples int64 [M]`: the index there of each target's row.
    """
    rows = [row for pack in packs for row in pack]
    as_read = _as_stored(rows) if as_read is None else as_read
    longest = max(row.token_ids.size for row in as_read)
    following_row = iter(as_read)
    ids = np.zeros((len(packs), length), np.int64)
    positions = np.empty_like(ids)
    places, counts = [], []
    ramp = np.arange(length)
    for b, pack in enumerate(packs):
        start = 0
        for _ in pack:
            token_ids, of_row = next(following_row)
            stop = start + token_ids.size
            ids[b, start:stop] = token_ids
            positions[b, start:stop] = ramp[: stop - start]
            at = of_row + start
            places.append(at)
            counts.append(at.size)
            start = stop
        positions[b, start:] = ramp[: length - start] % longest
    position = np.concatenate(places)
    of_sample = np.repeat(np.arange(len(rows)), counts)
    of_pack = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])[of_sample]
    labels = np.full_like(ids, IGNORED)
    labels[of_pack, position] = following = ids[of_pack, position + 1]
    targets = targets_at(rows, top_k, labels=following, row=of_pack, position=position)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
        "targets": targets,
        "sample_ids": [row.sample_id for row in rows],
        "target_samples": torch.from_numpy(of_sample),
    }


def _as_stored(rows: Sequence[CachedRow]) -> list[ReadRow]:
    return [ReadRow(row.token_ids, row.positions) for row in rows]


def targets_at(rows: Sequence[CachedRow], top_k: int | None, **places: np.ndarray) -> SparseTargets:
    """The targets of `rows`, in order, at the `places` that `SparseTargets.from_joined` takes."""
    stored = joined([row.targets for row in rows])
    if top_k is None or top_k >= stored.top_k:
        return SparseTargets.from_joined(stored, **places)
    reduced = with_smaller_top_k(stored, top_k)
    return SparseTargets.from_joined(reduced.targets, draw_weights=reduced.weights, **places)
