"""Writes rows as the bytes of a shard. Equal rows give equal bytes, with equal library versions."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.storage_schema.codec import MAX_ENTRIES, STREAMS, RowCodec
from coldstill.storage_schema.errors import InvalidRow, ShardTooLarge
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import CachedRow

from .layout import (
    FOOTER_KEY,
    LEAF_PATHS,
    MAX_FOOTER_BYTES,
    MAX_GROUP_BYTES,
    MAX_GROUP_ROWS,
    MAX_METADATA_BYTES,
    MAX_METADATA_DEPTH,
    MAX_ROW_BYTES,
    MAX_SHARD_BYTES,
    PLAIN_COLUMNS,
    SCHEMA,
    is_too_deep,
)


def write_shard(rows: Iterable[CachedRow], *, header: DatasetHeader) -> bytes:
    """The shard of `rows`.

    Raises `InvalidRow` or `InvalidTargets` for a row that fails a check of `rows.py` or a bound of the header, and
    `ShardTooLarge`.
    """
    codec = RowCodec(header)
    groups = _groups(_to_record(row, codec) for row in rows)
    return _write((pa.Table.from_pylist(group, schema=SCHEMA) for group in groups), header)


def copy_shard(batches: Iterable[pa.RecordBatch], *, header: DatasetHeader) -> bytes:
    """The shard of rows that are encoded already, each batch a row group: no frame is decompressed.

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
        raise ShardTooLarge(what, found=f"{size} bytes", wanted=f"at most {most}")


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
    """An upper bound of a row's bytes in Parquet's plain encoding: four length bytes per value, and levels."""
    plain = 4 * (len(record["token_ids"]) + len(record["target_spans"])) + len(record["metadata"].encode())
    media = sum(256 + len(item["bytes"] or b"") for item in record["media"])
    return 128 + plain + media + len(record["sample_id"].encode()) + sum(4 + len(record[name]) for name in STREAMS)


def _to_record(row: CachedRow, codec: RowCodec) -> dict[str, Any]:
    """Column values of a row. Raises what `write_shard` raises."""
    header = codec.header
    processor = header.about.processor
    row.check(token_count=header.token_count, image_token_id=processor.image_token_id if processor else None)
    _check_bounds(row, codec)
    return {
        "sample_id": row.sample_id,
        "token_ids": row.token_ids,
        "target_spans": np.asarray(row.target_spans, np.int32).reshape(-1),
        "metadata": metadata_json(row),
        "media": [
            {"position": item.position, "type": item.type, "sha256": item.sha256, "path": item.path, "bytes": item.data}
            for item in row.media
        ],
        **codec.encode(row.targets, labels=row.labels),
    }


def metadata_json(row: CachedRow) -> str:
    """A row's metadata as they are stored. Raises `InvalidRow` for those, or a sample id, that a shard cannot hold."""
    try:
        metadata = _json(row.metadata)
        encoded = metadata.encode()
        size = len(row.sample_id.encode()) + len(encoded)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRow(
            f"row {row.sample_id!r}", found=str(error)[:200], wanted="sample id as UTF-8, metadata as JSON in UTF-8"
        ) from None
    if size > MAX_METADATA_BYTES:
        raise InvalidRow(
            f"row {row.sample_id!r}: metadata", found=f"{size} bytes", wanted=f"at most {MAX_METADATA_BYTES}"
        )
    if is_too_deep(encoded):
        raise InvalidRow(
            f"row {row.sample_id!r}: metadata", found="deeper JSON", wanted=f"at most {MAX_METADATA_DEPTH} levels"
        )
    return metadata


def json_value(value: Any, *, default: Callable[[Any], Any] | None = None) -> Any:
    """What a row's metadata hold of a value. JSON has neither NaN nor infinities: they become null. `default`: as of
    `json.dumps`, which raises `TypeError` without it."""
    return json.loads(json.dumps(value, default=default), parse_constant=lambda _: None)


def _json(metadata: Mapping[str, Any]) -> str:
    """Metadata as JSON, which has neither NaN nor infinities: they become null. Raises `TypeError`, `ValueError`."""
    text = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
    if "NaN" not in text and "Infinity" not in text:  # nearly every row
        return text
    return json.dumps(json_value(metadata), ensure_ascii=False, sort_keys=True)


def _check_bounds(row: CachedRow, codec: RowCodec) -> None:
    """Raises `InvalidRow` if a row exceeds a bound of the header, which the decoder checks too."""
    header = codec.header
    targets = row.targets
    for name, found, wanted in (
        ("tokens", row.token_ids.size, header.max_length),
        ("top_k", targets.top_k, header.top_k),
        ("draw_counts", int(targets.draw_counts.max(initial=0)), header.kept_draws),
    ):
        if found > wanted:
            raise InvalidRow(
                f"row {row.sample_id!r}: {name}", found=found, wanted=f"at most {wanted}, as in the header"
            )
    for name, found in (("targets times top_k", targets.positions * header.top_k), ("draws", targets.draw_ids.size)):
        if found > MAX_ENTRIES:
            wanted_entries = f"at most {MAX_ENTRIES:,}, which readers take"
            raise InvalidRow(f"row {row.sample_id!r}: {name}", found=f"{found:,}", wanted=wanted_entries)
    if targets.draw_ids.size and header.draw_logprobs != (targets.draw_logprobs is not None):
        raise InvalidRow(
            f"row {row.sample_id!r}: draw_logprobs",
            found=targets.draw_logprobs is not None,
            wanted=header.draw_logprobs,
        )
