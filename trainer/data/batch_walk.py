"""Which rows make which batch: references in, batches of packs of references out, and a cursor behind each batch.

Without packing a pack is one row. An epoch ends where as many rows were taken as the datasets hold; what is pending
then is packed too, so no batch spans two epochs, and the last one of an epoch may be smaller.
"""

from __future__ import annotations

from typing import TypedDict

from coldstill.trainer.errors import RowTooLong

from .mixture import Mixture, MixtureCursor
from .packing import Packer
from .row_reader import RowReader, RowReference

Pack = list[RowReference]


class WalkCursor(TypedDict):
    """`epoch`: whole ones so far; `batches` so far; `pending`: rows taken and not given yet."""

    epoch: int
    batches: int
    mixture: MixtureCursor
    pending: list[list[int]]


class BatchWalk:
    """Batches of `batch_size` packs of `pack_length` tokens, or of single rows where that is None."""

    def __init__(self, reader: RowReader, mixture: Mixture, *, batch_size: int, pack_length: int | None):
        self._reader, self._mixture, self._batch_size = reader, mixture, batch_size
        self._packer = None if pack_length is None else Packer(pack_length)
        self._rows_per_epoch = sum(len(dataset) for dataset in reader.datasets)
        self.epoch = self._batches = 0

    def seek(self, cursor: WalkCursor) -> None:
        """Go to a place that `cursor` gave."""
        self.epoch, self._batches = cursor["epoch"], cursor["batches"]
        self._mixture.seek(cursor["mixture"])
        if self._packer is not None:
            self._packer.restore(RowReference(*row) for row in cursor["pending"])

    def cursor(self) -> WalkCursor:
        """Where the walk stands, fit for JSON."""
        pending = () if self._packer is None else self._packer.pending()
        return {
            "epoch": self.epoch,
            "batches": self._batches,
            "mixture": self._mixture.cursor(),
            "pending": [list(row) for row in pending],
        }

    def batch(self) -> list[Pack]:
        """The next batch. Raises `RowTooLong`, and as `RowReader.rows`."""
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
        """The next pack of this epoch."""
        if self._packer is None:
            return [next(self._mixture)] if self._rows_left else None
        while self._rows_left and not self._packer.is_full:
            row = next(self._mixture)
            if row.length > self._packer.length:
                self._refuse(row, self._packer.length)
            self._packer.add(row)
        return None if self._packer.is_empty else self._packer.pack()

    def _refuse(self, row: RowReference, pack_length: int) -> None:
        dataset = self._reader.datasets[row.dataset]
        sample_id = self._reader.rows([row])[0].sample_id
        raise RowTooLong(
            f"row {sample_id!r} of {dataset.store.url}",
            found=f"{row.length} tokens",
            wanted=f"at most pack_length, {pack_length}: rows are not split, targets need what is before them",
            fix=f"pack_length of {dataset.header.max_length} takes every row of this dataset",
        )
