"""Rows of a sealed dataset, shard by shard, in an order of its own per epoch; and batches of them.

A `Dataset` comes in. `StreamingRows` gives `CachedRow`s, `collate` turns a list of them into a right-padded batch.

Shape letters: `B` rows, `T` tokens of the longest row, `M` target positions of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from storage_schema import CachedRow, Dataset

from .targets import SparseTargets

IGNORED = -100
"""Label of a position that is no target: the value that transformers leaves out everywhere."""


class StreamingRows(IterableDataset):
    """Every row once per epoch; one shard in memory at a time.

    The order is a function of (seed, epoch) alone: shards are permuted, and rows inside each shard. Rows of one shard
    stay together, which is what streaming costs. Because a second pass gives the same rows, transformers' Trainer
    resumes exactly by skipping what was consumed.
    """

    def __init__(self, dataset: Dataset, *, seed: int):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; the Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[CachedRow]:
        if get_worker_info() is not None:
            raise RuntimeError("StreamingRows gives every row to every loader worker: set dataloader_num_workers=0")
        for shard in self._permutation(len(self.dataset.shards), stream=0):
            rows = self.dataset.read_shard(int(shard))
            for row in self._permutation(len(rows), stream=1 + int(shard)):
                yield rows[row]

    def _permutation(self, size: int, *, stream: int) -> np.ndarray:
        return np.random.default_rng((self.seed, self.epoch, stream)).permutation(size)


def collate(rows: Sequence[CachedRow]) -> dict[str, Any]:
    """A batch of `B` rows, padded on the right to `T` tokens.

    `input_ids`, `attention_mask` `int64 [B, T]`; `labels int64 [B, T]`: at target position `t` the token `t + 1`,
    already aligned and never shifted again, `IGNORED` elsewhere; `targets`: `SparseTargets` of the `M` positions;
    `sample_ids`: B strings, to name rows in errors.
    """
    targets = SparseTargets.from_rows(rows)
    tokens = [torch.from_numpy(row.token_ids.astype(np.int64)) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    lengths = torch.tensor([row.numel() for row in tokens])
    labels = torch.full_like(input_ids, IGNORED)
    labels[targets.row, targets.position] = targets.labels
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "labels": labels,
        "targets": targets,
        "sample_ids": [row.sample_id for row in rows],
    }
