"""`ShardIndex`: row groups, lengths and places of frames of a shard, for reading single rows.

It depends on the shard's bytes alone, so one process of a machine makes it and the others read it from a cache.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from coldstill.storage_schema.codec import STREAMS
from coldstill.storage_schema.errors import ShardDamaged
from coldstill.storage_schema.parquet import values_of

from .reader import ShardFile

_HEAD = struct.Struct("<8sIII")
_MAGIC = b"CSINDEX2"
_FRAME_VALUES = 2 * len(STREAMS)


class ShardIndex(NamedTuple):
    """`group_rows int32 [groups]`; `lengths int32 [rows]`: tokens of each row; `media int32 [rows]`: its media;
    `frames uint32 [rows, streams, 2]`: first byte in the file and bytes of each frame, 0 bytes for a stream that the
    row does not use."""

    group_rows: np.ndarray
    lengths: np.ndarray
    media: np.ndarray
    frames: np.ndarray

    @classmethod
    def of(cls, file: ShardFile) -> ShardIndex:
        """Read all row groups of a shard, one in memory at a time. Raises `ShardDamaged`."""
        lengths, frames = [np.empty(0, np.int32)], [np.empty((0, len(STREAMS), 2), np.uint32)]
        media = [np.empty(0, np.int32)]
        for group in range(len(file.group_rows)):
            batch, places = file.batch_and_frames(group)
            lengths.append(np.diff(values_of(batch.column("token_ids").offsets, np.int32)))
            media.append(np.diff(values_of(batch.column("media").offsets, np.int32)))
            frames.append(places)
        group_rows = np.array(file.group_rows, np.int32)
        return cls(group_rows, np.concatenate(lengths), np.concatenate(media), np.concatenate(frames))

    def to_bytes(self) -> bytes:
        """The index with a checksum. The byte order is the machine's: an index stays on its machine."""
        body = b"".join(part.tobytes() for part in self)
        return _HEAD.pack(_MAGIC, zlib.crc32(body), self.group_rows.size, self.lengths.size) + body

    @classmethod
    def from_bytes(cls, data: bytes, *, rows: int) -> ShardIndex | None:
        """The index of a shard of `rows` rows; None for bytes that are not one, such as those of a torn write."""
        if len(data) < _HEAD.size:
            return None
        magic, checksum, groups, found = _HEAD.unpack_from(data)
        body = memoryview(data)[_HEAD.size :]
        if (magic, found, checksum) != (_MAGIC, rows, zlib.crc32(body)):
            return None
        if len(body) != 4 * (groups + rows * (2 + _FRAME_VALUES)):
            return None
        group_rows = np.frombuffer(body, np.int32, groups)
        lengths = np.frombuffer(body, np.int32, rows, 4 * groups)
        media = np.frombuffer(body, np.int32, rows, 4 * (groups + rows))
        frames = np.frombuffer(body, np.uint32, rows * _FRAME_VALUES, 4 * (groups + 2 * rows))
        return cls(group_rows, lengths, media, frames.reshape(rows, len(STREAMS), 2))

    def rows_of(self, group: int) -> slice:
        """The rows of a row group, counted from the start of the shard."""
        start = int(self.group_rows[:group].sum())
        return slice(start, start + int(self.group_rows[group]))

    def read_frames(self, descriptor: int, rows: Sequence[int], *, where: str) -> list[Mapping[str, memoryview]]:
        """The frames of `rows` from the open file of the shard, by stream. Raises `ShardDamaged` if it is cut."""
        return [
            {
                name: memoryview(_exactly(descriptor, place, size, where) if size else b"")
                for name, (place, size) in zip(STREAMS, self.frames[row].tolist(), strict=True)
            }
            for row in rows
        ]


def _exactly(descriptor: int, place: int, size: int, where: str) -> bytes:
    data = os.pread(descriptor, size, place)
    if len(data) != size:
        raise ShardDamaged(
            where,
            found=f"{len(data)} of {size} bytes at byte {place}",
            wanted="the bytes that were there when it was verified",
            fix="copy this file again from where the dataset came from, and re-run the command to resume",
        )
    return data
