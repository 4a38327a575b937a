"""Reads all rows of a shard from bytes, or one row from a seekable file.

`ShardFile` reads row groups, `BatchRows` decodes the rows of a group. `BatchRows` slices the memory of Arrow columns:
Arrow's scalars and its conversion to numpy cost as much as the decoding, and the conversion imports pandas first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from cachetools import LRUCache

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.codec import STREAMS, RowCodec
from coldstill.storage_schema.errors import HeaderMismatch, InvalidRow, ShardDamaged
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.parquet import GroupFacts, PageFacts, check_pages, values_of
from coldstill.storage_schema.rows import (
    MAX_MEDIA,
    CachedRow,
    MediaReference,
    TeacherTargets,
    check_media,
    check_sequence,
    span_positions,
)

from .layout import (
    FOOTER_KEY,
    LEAF_PATHS,
    MAX_METADATA_BYTES,
    MAX_METADATA_DEPTH,
    PLAIN_COLUMNS,
    footer_header,
    is_too_deep,
    open_parquet,
)

_PLAIN_LEAVES = sum(path.split(".")[0] in PLAIN_COLUMNS for path in LEAF_PATHS)
_CACHED_GROUPS = 2
_ENTRIES_TOGETHER = 1 << 15
"""512 positions of K = 64. Shorter rows are decoded together, because numpy's calls cost more than their values; more
entries at once exceed a processor's cache."""


class ShardFile:
    """An open shard. The footer is checked on opening, a row group when it is read, a row when it is decoded.

    Raises `ShardDamaged`, and `HeaderMismatch` if `codec` is that of another dataset.
    """

    def __init__(self, source: pa.NativeFile, *, size: int, codec: RowCodec | None, where: str):
        self._source, self._where = source, where
        self._file, self._facts = open_parquet(source, size=size, where=where)
        self.header: DatasetHeader = footer_header(self._facts, where=where)
        if codec is not None and not codec.header.stands_for(self.header):
            fix = "this shard belongs to another dataset"
            codec.header.require_equal(self.header, where=f"{where}: footer", fix=fix)
            raise HeaderMismatch(
                f"{where}: footer", found="other facts in `about`", wanted=f"those of {HEADER_NAME}", fix=fix
            )
        self._codec = codec or RowCodec(self.header)
        self.group_rows = tuple(group.rows for group in self._facts.groups)
        # Not `cachedmethod`: its reference to `self` would keep row groups until Python collects cycles.
        self._batches: LRUCache[int, BatchRows] = LRUCache(_CACHED_GROUPS)

    def __len__(self) -> int:
        """Number of rows."""
        return sum(self.group_rows)

    @property
    def header_bytes(self) -> bytes:
        """The header as the footer holds it: the bytes of `dataset.json`."""
        return self._facts.key_values[FOOTER_KEY]

    def batch(self, group: int) -> pa.RecordBatch:
        """A row group as stored, with its frames not decompressed. Raises `ShardDamaged`."""
        return self._read(group, plain=False)[0]

    def plain_batch(self, group: int) -> pa.RecordBatch:
        """The plain columns of a row group, which lie before its frames. Raises `ShardDamaged`."""
        return self._read(group, plain=True)[0]

    def batch_and_frames(self, group: int) -> tuple[pa.RecordBatch, np.ndarray]:
        """A row group as stored, and where its frames are: `uint32 [rows, streams, 2]`, first byte in the file and
        bytes. Raises `ShardDamaged`."""
        batch, pages = self._read(group, plain=False)
        at = f"{self._where}: row group {group}"
        chunks = self._facts.groups[group].chunks[_PLAIN_LEAVES:]
        places = np.empty((batch.num_rows, len(STREAMS), 2), np.uint32)
        for stream, (name, chunk, stream_pages) in enumerate(zip(STREAMS, chunks, pages[_PLAIN_LEAVES:], strict=True)):
            column = batch.column(name)
            sizes = np.diff(np.array(_offsets(column, column.buffers()[1]), np.int64))
            row = 0
            for page in stream_pages:
                # The plain encoding of a binary value: its length in four bytes, then its bytes.
                of_page = sizes[row : row + page.values]
                ends = np.cumsum(of_page + 4)
                if of_page.size != page.values or ends.max(initial=0) != page.stop - page.start:
                    found = f"{page.values} values in {page.stop - page.start} bytes"
                    raise ShardDamaged(f"{at}, column {name}", found=found, wanted="the bytes of its values")
                places[row : row + page.values, stream, 0] = chunk.place + page.start + ends - of_page
                row += page.values
            places[:, stream, 1] = sizes
        return batch, places

    def _read(self, group: int, *, plain: bool) -> tuple[pa.RecordBatch, list[list[PageFacts]]]:
        """A row group or its plain columns, and the pages of each column."""
        at = f"{self._where}: row group {group}"
        facts = self._facts.groups[group]
        try:
            pages = self._check_pages(facts._replace(chunks=facts.chunks[:_PLAIN_LEAVES]) if plain else facts)
            table = self._file.read_row_group(group, columns=PLAIN_COLUMNS if plain else None, use_threads=False)
            table.validate()
            batches = table.combine_chunks().to_batches()
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise ShardDamaged(at, found=f"{type(error).__name__}: {error}"[:300], wanted="whole pages") from None
        if len(batches) != 1 or batches[0].num_rows != facts.rows:
            raise ShardDamaged(at, found=f"{table.num_rows} rows", wanted=facts.rows)
        return batches[0], pages

    def _check_pages(self, group: GroupFacts) -> list[list[PageFacts]]:
        first, last = group.chunks[0], group.chunks[-1]
        self._source.seek(first.place)
        # One read, which is one request for a remote file; Arrow's own reads then hit the file's buffer.
        data = memoryview(self._source.read_buffer(last.place + last.stored - first.place))
        starts = [chunk.place - first.place for chunk in group.chunks]
        return [
            check_pages(data[start : start + chunk.stored], chunk)
            for start, chunk in zip(starts, group.chunks, strict=True)
        ]

    def row(self, index: int) -> CachedRow:
        """Row number `index`: reads one row group, decodes one row."""
        first = 0
        for group, rows in enumerate(self.group_rows):
            if index < first + rows:
                batch = self._batches.get(group)
                if batch is None:
                    batch = self._batch_rows(group)
                    if rows > 1:  # one row alone may have 256 MB, and is rarely read again
                        self._batches[group] = batch
                return self._row(batch, index - first, index)
            first += rows
        raise IndexError(f"row {index} of a shard of {first} rows")

    def rows(self) -> Iterator[CachedRow]:
        """All rows, read one row group at a time."""
        number = 0
        for group in range(len(self.group_rows)):
            batch = self._batch_rows(group)
            index = 0
            while index < len(batch):
                try:
                    rows = batch.some(index)
                except ColdstillError as error:
                    raise error.at(f"{self._where}, row {number}") from None
                yield from rows
                index += len(rows)
                number += len(rows)

    def _batch_rows(self, group: int) -> BatchRows:
        return BatchRows(self.batch(group), self._codec)

    def _row(self, batch: BatchRows, index: int, number: int) -> CachedRow:
        try:
            return batch.row(index)
        except ColdstillError as error:
            raise error.at(f"{self._where}, row {number}") from None


def read_shard(data: bytes, *, header: DatasetHeader, where: str) -> Iterator[CachedRow]:
    """Rows of a shard given as bytes. Raises `ShardDamaged`, `HeaderMismatch`, `StreamDamaged`, `InvalidRow`."""
    return ShardFile(pa.BufferReader(data), size=len(data), codec=RowCodec(header), where=where).rows()


class _Head(NamedTuple):
    """A row without its targets."""

    sample_id: str
    token_ids: np.ndarray
    target_spans: np.ndarray
    metadata: dict[str, Any]
    media: tuple[MediaReference, ...]
    labels: np.ndarray

    def with_targets(self, targets: TeacherTargets) -> CachedRow:
        return CachedRow(
            sample_id=self.sample_id,
            token_ids=self.token_ids,
            target_spans=self.target_spans,
            targets=targets,
            metadata=self.metadata,
            media=self.media,
        )


class BatchRows:
    """Decodes rows of `batch`, a record batch with the columns `SCHEMA` and without nulls.

    `frames`: the frames of each row by stream, if `batch` has only the plain columns.
    """

    def __init__(
        self, batch: pa.RecordBatch, codec: RowCodec, *, frames: Sequence[Mapping[str, memoryview]] | None = None
    ):
        self._codec = codec
        self._sample_ids, self._metadata = _Values(batch.column("sample_id")), _Values(batch.column("metadata"))
        self._media = batch.column("media")
        self._token_ids, self._spans = _Integers(batch.column("token_ids")), _Integers(batch.column("target_spans"))
        self._given = frames
        self._streams = {name: _Values(batch.column(name)) for name in STREAMS} if frames is None else {}
        self._rows = batch.num_rows

    def __len__(self) -> int:
        """Number of rows."""
        return self._rows

    def row(self, index: int) -> CachedRow:
        """Row number `index`. Raises `InvalidRow`, `StreamDamaged`, `ShardDamaged`."""
        head = self._head(index)
        return head.with_targets(self._codec.decode(self._frames(index), labels=head.labels))

    def some(self, start: int) -> list[CachedRow]:
        """Rows from number `start` on, at least one: as many as are decoded efficiently together.

        Raises what `row` raises, only for row number `start`.
        """
        try:
            return self._together(start)
        except ColdstillError:
            return [self.row(start)]  # an error of a later row is raised when that row is first

    def _together(self, start: int) -> list[CachedRow]:
        heads = [self._head(start)]
        alike = _ENTRIES_TOGETHER // (heads[0].labels.size * self._codec.header.top_k)
        heads += [self._head(index) for index in range(start + 1, min(start + alike, self._rows))]
        frames = [self._frames(start + number) for number in range(len(heads))]
        targets = self._codec.decode_rows(frames, labels=[head.labels for head in heads])
        return [head.with_targets(row_targets) for head, row_targets in zip(heads, targets, strict=True)]

    def _head(self, index: int) -> _Head:
        sample_id, metadata = self._text(index)
        token_ids, target_spans = self._sequence(sample_id, index)
        media = self._media_of(index)
        check_media(sample_id, media, tokens=token_ids.size)
        labels = token_ids[span_positions(target_spans) + 1]
        return _Head(sample_id, token_ids, target_spans, metadata, media, labels)

    def _frames(self, index: int) -> Mapping[str, memoryview]:
        if self._given is not None:
            return self._given[index]
        return {name: values.at(index) for name, values in self._streams.items()}

    def _text(self, index: int) -> tuple[str, dict[str, Any]]:
        raw_id, raw_metadata = self._sample_ids.at(index), self._metadata.at(index)
        if (size := len(raw_id) + len(raw_metadata)) > MAX_METADATA_BYTES:
            raise InvalidRow("metadata", found=f"{size} bytes", wanted=f"at most {MAX_METADATA_BYTES}")
        text = bytes(raw_metadata)
        if is_too_deep(text):
            raise ShardDamaged("metadata", found="deeper JSON", wanted=f"at most {MAX_METADATA_DEPTH} levels")
        try:
            sample_id = str(raw_id, "utf-8")
            metadata = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError too
            raise ShardDamaged(
                "plain columns", found=f"{type(error).__name__}: {error}"[:200], wanted="UTF-8 and JSON"
            ) from None
        if not isinstance(metadata, dict):
            raise ShardDamaged("metadata", found=f"a JSON {type(metadata).__name__}", wanted="a JSON object")
        return sample_id, metadata

    def _media_of(self, index: int) -> tuple[MediaReference, ...]:
        items = self._media[index]
        if len(items) > MAX_MEDIA:
            raise InvalidRow("media", found=len(items), wanted=f"at most {MAX_MEDIA}")
        try:
            return tuple(_media(item) for item in items.as_py()) if len(items) else ()
        except ValueError as error:
            raise ShardDamaged("media", found=str(error)[:200], wanted="UTF-8") from None

    def _sequence(self, sample_id: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`token_ids int32 [T]` and `target_spans int32 [n, 2]`."""
        token_ids, flat_spans = self._token_ids.at(index), self._spans.at(index)
        if flat_spans.size % 2:
            raise InvalidRow("target_spans", found=f"{flat_spans.size} numbers", wanted="pairs (start, stop)")
        target_spans = flat_spans.reshape(-1, 2)
        header = self._codec.header
        check_sequence(sample_id, token_ids, target_spans, token_count=header.token_count)
        if token_ids.size > header.max_length:
            raise InvalidRow("token_ids", found=f"{token_ids.size} tokens", wanted=f"at most {header.max_length}")
        return token_ids, target_spans


class _Values:
    """A string or binary column, sliced from its memory."""

    def __init__(self, column: pa.Array):
        _, offsets, data = column.buffers()
        self._offsets = _offsets(column, offsets)
        self._data = memoryview(data) if data is not None else memoryview(b"")

    def at(self, index: int) -> memoryview:
        return self._data[self._offsets[index] : self._offsets[index + 1]]


class _Integers:
    """A column of lists of int32, sliced from its memory."""

    def __init__(self, column: pa.Array):
        self._offsets = _offsets(column, column.buffers()[1])
        self._values = values_of(column.values, np.int32)

    def at(self, index: int) -> np.ndarray:
        return self._values[self._offsets[index] : self._offsets[index + 1]]


def _offsets(column: pa.Array, buffer: pa.Buffer | None) -> list[int]:
    """`[n + 1]`: where each value of a column begins, and where the last ends."""
    if buffer is None or not len(column):
        return [0] * (len(column) + 1)
    return np.frombuffer(buffer, np.int32, len(column) + 1, 4 * column.offset).tolist()


def _media(item: dict[str, Any]) -> MediaReference:
    return MediaReference(
        position=item["position"], type=item["type"], sha256=item["sha256"], path=item["path"], data=item["bytes"]
    )
