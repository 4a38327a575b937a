"""One shard: a Parquet file with the rows of one unit. Rows in, bytes out, and back.

Plain columns (`sample_id`, `token_ids`, `target_spans`, `metadata`) can be read by any Parquet reader: a shard is an
SFT dataset without our code. Each codec stream is a `binary` column, one frame per row, so that a row can be decoded
alone. The header stands in the footer under `coldstill`: a shard alone can be read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .codec import STREAMS, decode, encode
from .errors import ColdstillError, ShardDamaged
from .header import DatasetHeader
from .rows import CachedRow, check_sequence, span_positions

FOOTER_KEY = b"coldstill"
ROWS_PER_GROUP = 1024
BYTES_PER_GROUP = 8 << 20
"""A row group is the finest random access that pyarrow has: a random row costs one small read."""

PLAIN_COLUMNS = ("sample_id", "token_ids", "target_spans", "metadata")
SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("target_spans", pa.list_(pa.int32())),
        ("metadata", pa.string()),
        *((name, pa.binary()) for name in STREAMS),
    ]
)


def write_shard(rows: Iterable[CachedRow], *, header: DatasetHeader) -> bytes:
    """The Parquet file of `rows`. Equal rows give equal bytes for equal library versions.

    Raises `InvalidRow` or `InvalidTargets` for a row that breaks a law of `rows.py`.
    """
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        SCHEMA,
        compression={name: "zstd" if name in PLAIN_COLUMNS else "none" for name in _leaf_paths()},
        use_dictionary=False,
        write_statistics=["sample_id"],
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        for group in _groups(_record(row, header) for row in rows):
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA), row_group_size=len(group))
        writer.add_key_value_metadata({FOOTER_KEY: header.to_bytes()})
    return sink.getvalue()


def read_shard(data: bytes, *, header: DatasetHeader, where: str) -> Iterator[CachedRow]:
    """Rows of a shard given as bytes. Raises `ShardDamaged`, `HeaderMismatch`, `StreamDamaged`, `InvalidRow`."""
    yield from (row for group in _row_groups(data, header, where) for row in _rows(group, header, where))


def read_footer_header(data: bytes, *, where: str) -> DatasetHeader:
    """The header in a shard's footer: a shard alone can be read."""
    return _footer_header(_parquet(data, where), where)


def _record(row: CachedRow, header: DatasetHeader) -> dict[str, Any]:
    row.check(token_count=header.token_count)
    return {
        "sample_id": row.sample_id,
        "token_ids": row.token_ids,
        "target_spans": np.asarray(row.target_spans, np.int32).reshape(-1),
        "metadata": json.dumps(row.metadata, ensure_ascii=False, sort_keys=True),
        **encode(row.targets, labels=row.labels, header=header),
    }


def _groups(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for record in records:
        group.append(record)
        size += 4 * len(record["token_ids"]) + len(record["metadata"]) + sum(len(record[name]) for name in STREAMS)
        if len(group) == ROWS_PER_GROUP or size >= BYTES_PER_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _leaf_paths() -> list[str]:
    """pyarrow matches compression settings on leaf paths: a list column's leaf is `name.list.element`."""
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in SCHEMA]


def _parquet(data: bytes, where: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardDamaged(where, found=f"{type(error).__name__}: {error}", wanted="a whole Parquet file") from None


def _footer_header(file: pq.ParquetFile, where: str) -> DatasetHeader:
    metadata = file.metadata.metadata or {}
    if FOOTER_KEY not in metadata:
        raise ShardDamaged(f"{where}: footer", found="no header", wanted=f"key {FOOTER_KEY.decode()!r}")
    return DatasetHeader.from_bytes(metadata[FOOTER_KEY], where=f"{where}: footer")


def _row_groups(data: bytes, header: DatasetHeader, where: str) -> Iterator[pa.RecordBatch]:
    file = _parquet(data, where)
    header.require_equal(
        _footer_header(file, where), where=f"{where}: footer", fix="this shard belongs to another dataset"
    )
    found = file.schema_arrow.remove_metadata()
    if not found.equals(SCHEMA):
        raise ShardDamaged(f"{where}: columns", found=found.names, wanted=SCHEMA.names)
    for group in range(file.num_row_groups):
        try:
            yield from file.read_row_group(group).to_batches()
        except (pa.ArrowException, OSError) as error:
            raise ShardDamaged(f"{where}: row group {group}", found=str(error), wanted="whole pages") from None


def _rows(batch: pa.RecordBatch, header: DatasetHeader, where: str) -> Iterator[CachedRow]:
    for index in range(batch.num_rows):
        sample_id = batch.column("sample_id")[index].as_py()
        try:
            yield _row(batch, index, sample_id, header)
        except ColdstillError as error:
            error.args = (f"{where}, row {index} ({sample_id!r}): {error.args[0]}",)
            raise
        except (ValueError, TypeError) as error:
            raise ShardDamaged(f"{where}, row {index}", found=str(error), wanted="values of the format") from None


def _row(batch: pa.RecordBatch, index: int, sample_id: str, header: DatasetHeader) -> CachedRow:
    token_ids = np.asarray(batch.column("token_ids")[index].values, dtype=np.int32)
    flat_spans = np.asarray(batch.column("target_spans")[index].values, dtype=np.int32)
    target_spans = flat_spans.reshape(-1, 2)
    check_sequence(sample_id, token_ids, target_spans, token_count=header.token_count)
    labels = token_ids[span_positions(target_spans) + 1]
    frames = {name: batch.column(name)[index].as_py() or b"" for name in STREAMS}
    return CachedRow(
        sample_id=sample_id,
        token_ids=token_ids,
        target_spans=target_spans,
        targets=decode(frames, labels=labels, header=header),
        metadata=json.loads(batch.column("metadata")[index].as_py()),
    )
