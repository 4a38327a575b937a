"""`LogitStream`: batches in an order that neither workers nor ranks change, each with the cursor that leads behind it.

`Sources` come in; dicts of `collate.py` with a `cursor` go out, to a DataLoader with `batch_size=None`.

Batch number b goes to rank b % R, and there to loader worker (b // R) % W, counted from where the stream was sought to.
Every worker walks the same rows by their lengths and decodes its own batches alone.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from coldstill.trainer.errors import CursorMismatch

from .background import ahead
from .batch_walk import BatchWalk, Pack
from .collate import collate, collate_packs
from .mixture import Mixture
from .packing import packs_of
from .row_feed import RowFeed
from .row_reader import RowReader
from .sources import Sources

CURSOR_VERSION = 1
_SAMPLED_LENGTHS = 1024
_DECODED_AHEAD = 2
"""Batches that a thread has ready where there are no loader workers."""


class LogitStream(IterableDataset):
    """Made by `LogitDataset.stream`. Each pass over it begins where `seek` led."""

    def __init__(
        self,
        sources: Sources,
        *,
        batch_size: int,
        seed: int,
        pack_length: int | None = None,
        epochs: int | None = None,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._sources = sources
        self.batch_size, self.pack_length, self.epochs = batch_size, pack_length, epochs
        self.seed, self.shuffle = seed, shuffle
        self.rank, self.world_size = rank, world_size
        self._cursor: dict[str, Any] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch that a rank gets, rounded up. With packing an estimate: as if all packs were as full as
        those of the first 1,024 rows, whose shards are read for it. Raises as `RowReader.rows`."""
        packs = self._sources.rows if self.pack_length is None else self._estimated_packs(self.pack_length)
        return math.ceil(math.ceil(packs / self.batch_size) / self.world_size)

    def seek(self, cursor: dict[str, Any] | None) -> None:
        """Begin behind the batch that carried `cursor`; at the very beginning where that is None.

        The numbers of ranks and workers, the batch size and `epochs` may differ from what they were. Raises
        `CursorMismatch` for a cursor of another sequence of rows.
        """
        if cursor is not None:
            self._check(cursor)
        self._cursor = cursor

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises `RowTooLong`, and as `RowReader.rows`."""
        worker = get_worker_info()
        if worker is None:
            yield from ahead(self._batches(worker=0, workers=1), depth=_DECODED_AHEAD)
        else:
            yield from self._batches(worker=worker.id, workers=worker.num_workers)

    def _batches(self, *, worker: int, workers: int) -> Generator[dict[str, Any], None, None]:
        reader = self._sources.reader()
        try:
            walk = self._walk(reader)
            for number in count():
                turn = self._turn(walk)
                if not turn:
                    return
                if number % workers == worker and self.rank < len(turn):
                    cursor = {**self._identity(), "walk": walk.cursor()}
                    yield {**self._collated(reader, turn[self.rank]), "cursor": cursor}
        finally:
            reader.close()

    def _walk(self, reader: RowReader) -> BatchWalk:
        feeds = [
            RowFeed(reader, number, seed=self.seed, shuffle=self.shuffle) for number in range(len(reader.datasets))
        ]
        mixture = Mixture(feeds, weights=self._sources.weights, seed=self.seed)
        walk = BatchWalk(reader, mixture, batch_size=self.batch_size, pack_length=self.pack_length)
        if self._cursor is not None:
            walk.seek(self._cursor["walk"])
        return walk

    def _turn(self, walk: BatchWalk) -> list[list[Pack]]:
        """A batch for each rank, fewer at the very end. The cursor behind all of them is the same on every rank."""
        turn: list[list[Pack]] = []
        while len(turn) < self.world_size and (self.epochs is None or walk.epoch < self.epochs):
            turn.append(walk.batch())
        return turn

    def _collated(self, reader: RowReader, packs: list[Pack]) -> dict[str, Any]:
        rows = self._sources.read(reader, [row for pack in packs for row in pack], seed=self.seed)
        if self.pack_length is None:
            return collate(rows, top_k=self._sources.top_k)
        following = iter(rows)
        packed = [[next(following) for _ in pack] for pack in packs]
        return collate_packs(packed, length=self.pack_length, top_k=self._sources.top_k)

    def _estimated_packs(self, pack_length: int) -> int:
        packs = 0.0
        reader = self._sources.reader()
        try:
            for number, (dataset, weight) in enumerate(zip(reader.datasets, self._sources.weights, strict=True)):
                sample = [min(length, pack_length) for length in islice(_lengths(reader, number), _SAMPLED_LENGTHS)]
                tokens_of_row = dataset.manifest.tokens / len(dataset)
                rows = self._sources.rows * weight / sum(self._sources.weights)
                packs += rows * tokens_of_row / sum(sample) * packs_of(sample, pack_length)
        finally:
            reader.close()
        return math.ceil(packs)

    def _identity(self) -> dict[str, Any]:
        """What decides the sequence of rows, fit for JSON."""
        return {
            "version": CURSOR_VERSION,
            "datasets": [dataset.dataset_id for dataset in self._sources.datasets],
            "weights": list(self._sources.weights),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "pack_length": self.pack_length,
        }

    def _check(self, cursor: dict[str, Any]) -> None:
        for name, wanted in self._identity().items():
            if cursor.get(name) != wanted:
                raise CursorMismatch(
                    f"cursor: {name}",
                    found=cursor.get(name),
                    wanted=wanted,
                    fix="go on with the data and settings that the run began with, or begin a new run",
                )


def _lengths(reader: RowReader, dataset: int) -> Iterator[int]:
    """Tokens of the rows of a dataset, as they are stored."""
    for shard, record in enumerate(reader.datasets[dataset].shards):
        if record.rows:
            for group in range(reader.groups(dataset, shard)):
                yield from reader.lengths(dataset, shard, group).tolist()
