"""`LogitStream`: batches in an order independent of workers and ranks, each with a resume cursor.

A DataLoader takes it with `batch_size=None`; each batch is a dict of `collate.py` and a `cursor`.

Batch number b goes to rank b % R, and there to loader worker (b // R) % W, counted from the place of `seek`. Every
worker enumerates the same rows by their lengths and reads and decodes only those of its own batches. Their images are
decoded there too, so memory for pixels is bounded by the batches in flight: `_PREFETCHED_BATCHES` and the one of the
step, or torch's `prefetch_factor` (2) for each worker.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol

from torch.utils.data import IterableDataset, get_worker_info

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.rows import CachedRow
from coldstill.trainer.errors import CursorMismatch, PackingUnsupported

from .batch_sampler import BatchSampler, Pack
from .collate import collate, collate_packs
from .ensemble import ensemble_targets
from .images import RowExpander, StudentImages, require_no_images
from .packing import packs_of
from .prefetch import prefetch
from .row_reader import RowReader, RowReference, Sources
from .shuffled_rows import Mixture, ShuffledRows

CURSOR_VERSION = 1
_SAMPLED_LENGTHS = 1024
_PREFETCHED_BATCHES = 2
"""Batches that a thread decodes in advance in a process without loader workers."""


@dataclass(frozen=True)
class _Failure:
    """Takes the place of a batch: torch puts the traceback of a worker's exception into its message."""

    error: ColdstillError


class PassingErrors(IterableDataset):
    """The batches of `stream`; a named error of a loader worker is sent as an item, for `raising_passed`."""

    def __init__(self, stream: LogitStream):
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        """The batches, and at most one failure at the end."""
        try:
            yield from self.stream
        except ColdstillError as error:
            if get_worker_info() is None:
                raise
            yield _Failure(error)


def raising_passed(items: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The batches of a loader of `PassingErrors`. Raises what the worker raised."""
    for item in items:
        if isinstance(item, _Failure):
            raise item.error
        yield item


class Collator(Protocol):
    """Makes batches in another way than `collate`; several threads and processes use a copy of one object."""

    def collate(self, rows: Sequence[CachedRow], datasets: Sequence[int], *, top_k: int | None) -> dict[str, Any]:
        """A batch with at least the keys of `collate`. `datasets`: the number of the dataset of each row."""
        ...


class LogitStream(IterableDataset):
    """Made by `LogitDataset.stream`. Each pass over it begins at the place of `seek`."""

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
        images: StudentImages | None = None,
        collator: Collator | None = None,
    ):
        self._sources, self._images, self._collator = sources, images, collator
        self.batch_size, self.pack_length, self.epochs = batch_size, pack_length, epochs
        self.seed, self.shuffle = seed, shuffle
        self.rank, self.world_size = rank, world_size
        self._cursor: dict[str, Any] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch on this rank, rounded up.

        With packing this is an estimate: all packs are assumed as full as those of the first 1,024 rows, whose shards
        are read for it. Raises what `RowReader.rows` raises.
        """
        packs = self._sources.rows if self.pack_length is None else self._estimated_packs(self.pack_length)
        return math.ceil(math.ceil(packs / self.batch_size) / self.world_size)

    def seek(self, cursor: dict[str, Any] | None) -> None:
        """Begin the next pass after the batch that carried `cursor`; at the start of the data if it is None.

        The numbers of ranks and workers, the batch size and `epochs` may have changed. Raises `CursorMismatch` for a
        cursor of another sequence of rows.
        """
        if cursor is not None:
            self._check(cursor)
        self._cursor = cursor

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises `RowTooLong`, `EnsembleMismatch`, what `RowReader.rows` raises, and what `RowExpander.expand` raises.

        A row with images raises `StudentSeesNoImages` for a student that sees none, and `PackingUnsupported` in a pack.
        """
        worker = get_worker_info()
        if worker is None:
            yield from prefetch(self._batches(worker=0, workers=1), depth=_PREFETCHED_BATCHES)
        else:
            # A fork has none of the threads of the tokenizers library and waits for them for ever. The library leaves
            # them out after a fork by itself, but not if the user's environment says "true".
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            yield from self._batches(worker=worker.id, workers=worker.num_workers)

    def _batches(self, *, worker: int, workers: int) -> Generator[dict[str, Any], None, None]:
        reader = self._sources.reader()
        expander: RowExpander | None = None
        try:
            sampler = self._sampler(reader)
            for number in count():
                turn = self._turn(sampler)
                if not turn:
                    return
                if number % workers == worker and self.rank < len(turn):
                    if expander is None and self._images is not None:
                        expander = RowExpander(self._images)
                    # The keys of a cursor are stored in checkpoints.
                    cursor = {**self._identity(), "walk": sampler.cursor()}
                    yield {**self._collated(reader, turn[self.rank], expander), "cursor": cursor}
        finally:
            reader.close()

    def _sampler(self, reader: RowReader) -> BatchSampler:
        datasets = [
            ShuffledRows(reader, number, seed=self.seed, shuffle=self.shuffle)
            for number in range(len(self._sources.datasets))
        ]
        # Unshuffled rows are measured: to draw their dataset would take some twice and leave others out.
        in_turn = None if self.shuffle else self._sources.counts
        mixture = Mixture(datasets, weights=self._sources.weights, seed=self.seed, in_turn=in_turn)
        sampler = BatchSampler(
            reader, mixture, rows=self._sources.rows, batch_size=self.batch_size, pack_length=self.pack_length
        )
        if self._cursor is not None:
            sampler.seek(self._cursor["walk"])
        return sampler

    def _turn(self, sampler: BatchSampler) -> list[list[Pack]]:
        """A batch for each rank, fewer at the end of the last epoch. All ranks get the cursor behind all of them."""
        turn: list[list[Pack]] = []
        while len(turn) < self.world_size and (self.epochs is None or sampler.epoch < self.epochs):
            turn.append(sampler.batch())
        return turn

    def _collated(self, reader: RowReader, packs: list[Pack], expander: RowExpander | None) -> dict[str, Any]:
        wanted = [row for pack in packs for row in pack]
        rows = self._sources.read(reader, wanted, seed=self.seed)
        if self._collator is not None:
            return self._collator.collate(rows, [row.dataset for row in wanted], top_k=self._sources.top_k)
        batch = self._batch_of(reader, packs, wanted, rows, expander)
        if self._sources.partners:
            targets = ensemble_targets(self._sources, reader, wanted, rows, batch["targets"], seed=self.seed)
            batch["targets"] = targets
        return batch

    def _batch_of(
        self,
        reader: RowReader,
        packs: list[Pack],
        wanted: list[RowReference],
        rows: list[CachedRow],
        expander: RowExpander | None,
    ) -> dict[str, Any]:
        if expander is None:
            require_no_images(reader.placed(wanted, rows))
        if self.pack_length is None:
            read = None if expander is None else expander.expand(reader.placed(wanted, rows))
            return collate(rows, top_k=self._sources.top_k, read=read)
        for row in rows:
            if row.media:
                raise packing_of_images(f"row {row.sample_id!r}", f"{len(row.media)} images")
        following = iter(rows)
        packed = [[next(following) for _ in pack] for pack in packs]
        return collate_packs(packed, length=self.pack_length, top_k=self._sources.top_k)

    def _estimated_packs(self, pack_length: int) -> int:
        packs = 0.0
        reader = self._sources.reader()
        try:
            for number, (dataset, weight) in enumerate(zip(self._sources.datasets, self._sources.weights, strict=True)):
                sample = [min(length, pack_length) for length in islice(_lengths(reader, number), _SAMPLED_LENGTHS)]
                of_all = dataset.manifest.tokens / len(dataset)
                tokens_of_row = sum(sample) / len(sample) if self._sources.without_images else of_all
                rows = self._sources.rows * weight / sum(self._sources.weights)
                packs += rows * tokens_of_row / sum(sample) * packs_of(sample, pack_length)
        finally:
            reader.close()
        return math.ceil(packs)

    def _identity(self) -> dict[str, Any]:
        """What determines the sequence of rows, fit for JSON."""
        return {
            "version": CURSOR_VERSION,
            "datasets": [dataset.dataset_id for dataset in self._sources.datasets],
            "weights": list(self._sources.weights),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "pack_length": self.pack_length,
            **({"rows": "without_images"} if self._sources.without_images else {}),
            **({"ensemble": self._ensemble()} if self._sources.partners else {}),
        }

    def _ensemble(self) -> dict[str, Any]:
        ids = [dataset.dataset_id for dataset in self._sources.partners]
        return {"datasets": ids, "weights": list(self._sources.shares)}

    def _check(self, cursor: dict[str, Any]) -> None:
        identity = self._identity()
        for name in dict.fromkeys((*identity, "rows", "ensemble")):
            if cursor.get(name) != identity.get(name):
                raise CursorMismatch(
                    f"cursor: {name}",
                    found=cursor.get(name),
                    wanted=identity.get(name),
                    fix="resume with the datasets and settings of the interrupted run, or start a new run",
                )


def packing_of_images(what: str, found: str) -> PackingUnsupported:
    """The error for rows with images where rows are packed."""
    return PackingUnsupported(
        f"packing of {what}",
        found=found,
        wanted="rows of text: a family may place the patches of an image by the tokens of a whole sequence",
        fix="set pack_length to null, or data.rows to without_images",
    )


def _lengths(reader: RowReader, dataset: int) -> Iterator[int]:
    """Tokens of the rows of a dataset that are used, in stored order."""
    for shard, record in enumerate(reader.datasets[dataset].shards):
        if record.rows:
            for group in range(reader.groups(dataset, shard)):
                yield from reader.lengths(dataset, shard, group)[reader.numbers(dataset, shard, group)].tolist()
