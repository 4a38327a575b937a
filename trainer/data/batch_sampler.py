"""Which rows form which batch, with a cursor behind each batch.

A pack is a list of rows that share one sequence; without packing it is a single row. An epoch ends when as many rows
were taken as the datasets hold and training uses. The rows pending then are packed too, so no batch spans two epochs,
and the last batch of an epoch may be smaller.
"""

from __future__ import annotations

from typing import TypedDict

from coldstill.trainer.errors import RowTooLong

from .packing import Packer
from .row_reader import RowReader, RowReference
from .shuffled_rows import Mixture, MixtureCursor

Pack = list[RowReference]


class SamplerCursor(TypedDict):
    """Completed epochs, batches so far, and the `pending` rows: taken, not yet in a batch. Stored in checkpoints."""

    epoch: int
    batches: int
    mixture: MixtureCursor
    pending: list[list[int]]


class BatchSampler:
    """Batches of `batch_size` packs of up to `pack_length` tokens; of single rows if `pack_length` is None.

    `rows`: of an epoch.
    """

    def __init__(self, reader: RowReader, mixture: Mixture, *, rows: int, batch_size: int, pack_length: int | None):
        self._reader, self._mixture, self._batch_size = reader, mixture, batch_size
        self._packer = None if pack_length is None else Packer(pack_length)
        self._rows_per_epoch = rows
        self.epoch = self._batches = 0

    def seek(self, cursor: SamplerCursor) -> None:
        """Continue from a place that `cursor` returned."""
        self.epoch, self._batches = cursor["epoch"], cursor["batches"]
        self._mixture.seek(cursor["mixture"])
        if self._packer is not None:
            self._packer.restore(RowReference(*row) for row in cursor["pending"])

    def cursor(self) -> SamplerCursor:
        """The place behind the last batch, fit for JSON."""
        pending = () if self._packer is None else self._packer.pending()
        return {
            "epoch": self.epoch,
            "batches": self._batches,
            "mixture": self._mixture.cursor(),
            "pending": [list(row) for row in pending],
        }

    def batch(self) -> list[Pack]:
        """The next batch. Raises `RowTooLong`, and what `RowReader.rows` raises."""
        packs: list[Pack] = []
        while len(packs) < self._batch_size and (pack := self._pack()):
            packs.append(pack)
        self._batches += 1
        if not self._rows_left and (self._packer is None or self._packer.is_empty):
            self.epoch += 1
        return packs

    @property
    def _rows_left(self) -> int:
        return (self.epoch + 1) * self._rows_per_epoch - self._mixture.taken

    def _pack(self) -> Pack | None:
        """The next pack of this epoch; None if the epoch has no more rows."""
        if self._packer is None:
            return [next(self._mixture)] if self._rows_left else None
        while self._rows_left and not self._packer.is_full:
            row = next(self._mixture)
            if row.length > self._packer.length:
                raise self._too_long(row, self._packer.length)
            self._packer.add(row)
        return None if self._packer.is_empty else self._packer.pack()

    def _too_long(self, row: RowReference, pack_length: int) -> RowTooLong:
        dataset = self._reader.datasets[row.dataset]
        sample_id = self._reader.rows([row])[0].sample_id
        return RowTooLong(
            f"row {sample_id!r} of {dataset.store.url}",
            found=f"{row.length} tokens",
            wanted=f"at most pack_length, {pack_length}: a row is never split, its targets depend on all tokens before",
            fix=f"set pack_length to {dataset.header.max_length}, the longest row that this dataset may hold",
        )
