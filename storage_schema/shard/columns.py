"""The columns of a shard, and a row as their values and back.

Plain columns can be read by any Parquet reader: a shard is an SFT dataset without our code. Each codec stream is a
`binary` column, one frame per row, so that a row can be decoded alone.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from storage_schema.codec import STREAMS, RowCodec
from storage_schema.errors import InvalidRow, ShardDamaged
from storage_schema.media import MAX_MEDIA, MediaReference, check_media
from storage_schema.rows import CachedRow, check_sequence, span_positions

MAX_METADATA_BYTES = 1 << 20


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


_MEDIA = pa.struct(
    [
        pa.field("position", pa.int32(), nullable=False),
        pa.field("type", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("path", pa.string()),
        pa.field("bytes", pa.binary()),
    ]
)

PLAIN_COLUMNS = ("sample_id", "token_ids", "target_spans", "metadata", "media")
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("token_ids", _list_of(pa.int32()), nullable=False),
        pa.field("target_spans", _list_of(pa.int32()), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("media", _list_of(_MEDIA), nullable=False),
        *(pa.field(name, pa.binary(), nullable=False) for name in STREAMS),
    ]
)


def _leaves(field: pa.Field, path: str) -> list[str]:
    if pa.types.is_list(field.type):
        return _leaves(field.type.value_field, f"{path}.list.element")
    if pa.types.is_struct(field.type):
        return [leaf for inner in field.type for leaf in _leaves(inner, f"{path}.{inner.name}")]
    return [path]


LEAF_PATHS = tuple(leaf for field in SCHEMA for leaf in _leaves(field, field.name))
"""The columns as Parquet has them, for instance `token_ids.list.element`."""


def to_record(row: CachedRow, codec: RowCodec) -> dict[str, Any]:
    """Column values of a row. Raises `InvalidRow` or `InvalidTargets` for one that breaks a law of `rows.py`."""
    header = codec.header
    row.check(token_count=header.token_count)
    _check_bounds(row, codec)
    try:
        metadata = json.dumps(row.metadata, ensure_ascii=False, sort_keys=True)
        size = len(f"{row.sample_id}{metadata}".encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRow(
            f"row {row.sample_id!r}", found=str(error)[:200], wanted="sample id as UTF-8, metadata as JSON in UTF-8"
        ) from None
    if size > MAX_METADATA_BYTES:
        raise InvalidRow(
            f"row {row.sample_id!r}: metadata", found=f"{size} bytes", wanted=f"at most {MAX_METADATA_BYTES}"
        )
    return {
        "sample_id": row.sample_id,
        "token_ids": row.token_ids,
        "target_spans": np.asarray(row.target_spans, np.int32).reshape(-1),
        "metadata": metadata,
        "media": [
            {"position": item.position, "type": item.type, "sha256": item.sha256, "path": item.path, "bytes": item.data}
            for item in row.media
        ],
        **codec.encode(row.targets, labels=row.labels),
    }


def from_batch(batch: pa.RecordBatch, index: int, codec: RowCodec) -> CachedRow:
    """Row number `index` of a record batch; its neighbours are not decoded.

    Raises `InvalidRow`, `StreamDamaged`, `ShardDamaged`.
    """
    text = batch.column("sample_id")[index].as_buffer().size + batch.column("metadata")[index].as_buffer().size
    for name, size, most in (
        ("metadata", text, MAX_METADATA_BYTES),
        ("media", len(batch.column("media")[index]), MAX_MEDIA),
    ):
        if size > most:
            raise InvalidRow(name, found=size, wanted=f"at most {most}")
    try:
        sample_id = batch.column("sample_id")[index].as_py()
        metadata = json.loads(batch.column("metadata")[index].as_py())
        media = tuple(_media(item) for item in batch.column("media")[index].as_py())
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError too
        raise ShardDamaged(
            "plain columns", found=f"{type(error).__name__}: {error}"[:200], wanted="UTF-8 and JSON"
        ) from None
    if not isinstance(metadata, dict):
        raise ShardDamaged("metadata", found=f"a JSON {type(metadata).__name__}", wanted="a JSON object")
    token_ids, target_spans = sequence_of(batch, index, codec)
    check_media(sample_id, media, tokens=token_ids.size)
    labels = token_ids[span_positions(target_spans) + 1]
    frames = {name: batch.column(name)[index].as_buffer() for name in STREAMS}
    targets = codec.decode(frames, labels=labels)
    return CachedRow(
        sample_id=sample_id,
        token_ids=token_ids,
        target_spans=target_spans,
        targets=targets,
        metadata=metadata,
        media=media,
    )


def sequence_of(batch: pa.RecordBatch, index: int, codec: RowCodec) -> tuple[np.ndarray, np.ndarray]:
    """`token_ids int32 [T]` and `target_spans int32 [n, 2]` of a row, without its targets. Raises `InvalidRow`."""
    token_ids = _integers(batch.column("token_ids")[index].values)
    flat_spans = _integers(batch.column("target_spans")[index].values)
    if flat_spans.size % 2:
        raise InvalidRow("target_spans", found=f"{flat_spans.size} numbers", wanted="pairs (start, stop)")
    target_spans = flat_spans.reshape(-1, 2)
    check_sequence("", token_ids, target_spans, token_count=codec.header.token_count)
    if token_ids.size > codec.header.max_length:
        raise InvalidRow("token_ids", found=f"{token_ids.size} tokens", wanted=f"at most {codec.header.max_length}")
    return token_ids, target_spans


def _integers(values: pa.Array) -> np.ndarray:
    """`int32 [n]`: the array's own memory. Arrow's conversion to numpy imports pandas first, which takes seconds."""
    buffer = values.buffers()[1]
    return np.frombuffer(buffer, np.int32, len(values), 4 * values.offset) if len(values) else np.empty(0, np.int32)


def _check_bounds(row: CachedRow, codec: RowCodec) -> None:
    """What the header promises of every row, and the decoder holds it to."""
    header = codec.header
    targets = row.targets
    for name, found, wanted in (
        ("tokens", row.token_ids.size, header.max_length),
        ("top_k", targets.top_k, header.top_k),
        ("draw_counts", int(targets.draw_counts.max(initial=0)), header.kept_draws),
    ):
        if found > wanted:
            raise InvalidRow(
                f"row {row.sample_id!r}: {name}", found=found, wanted=f"at most {wanted}, as the header says"
            )
    if targets.draw_ids.size and header.draw_logprobs != (targets.draw_logprobs is not None):
        raise InvalidRow(
            f"row {row.sample_id!r}: draw_logprobs",
            found=targets.draw_logprobs is not None,
            wanted=header.draw_logprobs,
        )


def _media(item: dict[str, Any]) -> MediaReference:
    return MediaReference(
        position=item["position"], type=item["type"], sha256=item["sha256"], path=item["path"], data=item["bytes"]
    )
