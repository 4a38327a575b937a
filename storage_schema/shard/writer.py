"""Rows in, the bytes of a Parquet file out. Equal rows give equal bytes for equal library versions."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.storage_schema.codec import STREAMS, RowCodec
from coldstill.storage_schema.errors import InvalidRow, ShardTooLarge
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import CachedRow

from .columns import LEAF_PATHS, PLAIN_COLUMNS, SCHEMA, to_record
from .footer import FOOTER_KEY, MAX_FOOTER_BYTES, MAX_GROUP_BYTES, MAX_GROUP_ROWS, MAX_ROW_BYTES, MAX_SHARD_BYTES


def write_shard(rows: Iterable[CachedRow], *, header: DatasetHeader) -> bytes:
    """The Parquet file of `rows`.

    Raises `InvalidRow` or `InvalidTargets` for a row that breaks a law of `rows.py`, and `ShardTooLarge`.
    """
    codec = RowCodec(header)
    groups = _groups(to_record(row, codec) for row in rows)
    return _write((pa.Table.from_pylist(group, schema=SCHEMA) for group in groups), header)


def copy_shard(batches: Iterable[pa.RecordBatch], *, header: DatasetHeader) -> bytes:
    """The Parquet file of rows that are encoded already, each batch a row group: no frame is opened.

    Raises `ShardTooLarge`.
    """
    return _write((pa.Table.from_batches([batch]) for batch in batches if batch.num_rows), header)


def _write(groups: Iterable[pa.Table], header: DatasetHeader) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        SCHEMA,
        compression={path: "zstd" if path.split(".")[0] in PLAIN_COLUMNS else "none" for path in LEAF_PATHS},
        use_dictionary=False,
        write_statistics=["sample_id"],
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=group.num_rows)
            _check_size("a shard", sink.tell(), MAX_SHARD_BYTES)
        pages = sink.tell()
        writer.add_key_value_metadata({FOOTER_KEY: header.to_bytes()})
    _check_size("the footer of a shard", sink.tell() - pages, MAX_FOOTER_BYTES)
    return sink.getvalue()


def _check_size(what: str, size: int, most: int) -> None:
    if size > most:
        raise ShardTooLarge(what, found=f"{size} bytes", wanted=f"at most {most}", fix="lower rows_per_unit")


def _groups(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    total = 0
    for record in records:
        size = _size(record)
        if size > MAX_ROW_BYTES:
            raise InvalidRow(f"row {record['sample_id']!r}", found=f"{size} bytes", wanted=f"at most {MAX_ROW_BYTES}")
        if group and (len(group) == MAX_GROUP_ROWS or total + size > MAX_GROUP_BYTES):
            yield group
            group, total = [], 0
        group.append(record)
        total += size
    if group:
        yield group


def _size(record: dict[str, Any]) -> int:
    """Bytes of a row in Parquet's plain encoding, four of length for each value, with room for levels."""
    plain = 4 * (len(record["token_ids"]) + len(record["target_spans"])) + len(record["metadata"].encode())
    media = sum(256 + len(item["bytes"] or b"") for item in record["media"])
    return 128 + plain + media + len(record["sample_id"].encode()) + sum(4 + len(record[name]) for name in STREAMS)
