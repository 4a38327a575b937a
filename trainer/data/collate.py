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

from .subsample import with_smaller_top_k

IGNORED = -100
"""Label of a position that is not a target: the value that transformers ignores everywhere."""


def collate(rows: Sequence[CachedRow], *, top_k: int | None = None) -> dict[str, Any]:
    """`B` rows, padded on the right to the longest.

    The batch of `collate_packs`, and `attention_mask int64 [B, T]`: 1 at tokens, 0 at padding.
    """
    length = max(row.token_ids.size for row in rows)
    batch = collate_packs([[row] for row in rows], length=length, top_k=top_k)
    lengths = torch.tensor([row.token_ids.size for row in rows])
    return {**batch, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def collate_packs(packs: Sequence[Sequence[CachedRow]], *, length: int, top_k: int | None = None) -> dict[str, Any]:
    """`B` packs of `T = length` tokens, each the tokens of its rows in order, padded on the right.

    - `input_ids`, `position_ids` `int64 [B, T]`. Positions restart at 0 in each row and in the padding: without a mask,
      transformers derives from them which tokens attend to each other (only with `use_cache=False`).
    - `labels int64 [B, T]`: token `t + 1` at a target position `t` of a row, so they are already aligned and must not
      be shifted; `IGNORED` elsewhere.
    - `targets`: `SparseTargets` of the `M` positions, reduced to the `top_k` most probable ids where given.
    - `sample_ids`: a name per row; `target_samples int64 [M]`: the index there of each target's row.
    """
    rows = [row for pack in packs for row in pack]
    ids = np.zeros((len(packs), length), np.int64)
    positions = np.empty_like(ids)
    places, counts = [], []
    ramp = np.arange(length)
    for b, pack in enumerate(packs):
        start = 0
        for row in pack:
            stop = start + row.token_ids.size
            ids[b, start:stop] = row.token_ids
            positions[b, start:stop] = ramp[: stop - start]
            at = row.positions + start
            places.append(at)
            counts.append(at.size)
            start = stop
        positions[b, start:] = ramp[: length - start]
    position = np.concatenate(places)
    of_sample = np.repeat(np.arange(len(rows)), counts)
    of_pack = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])[of_sample]
    labels = np.full_like(ids, IGNORED)
    labels[of_pack, position] = following = ids[of_pack, position + 1]
    targets = _targets(rows, top_k, labels=following, row=of_pack, position=position)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
        "targets": targets,
        "sample_ids": [row.sample_id for row in rows],
        "target_samples": torch.from_numpy(of_sample),
    }


def _targets(rows: Sequence[CachedRow], top_k: int | None, **places: np.ndarray) -> SparseTargets:
    stored = joined([row.targets for row in rows])
    if top_k is None or top_k >= stored.top_k:
        return SparseTargets.from_joined(stored, **places)
    reduced = with_smaller_top_k(stored, top_k)
    return SparseTargets.from_joined(reduced.targets, draw_weights=reduced.weights, **places)
