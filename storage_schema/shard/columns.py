"""The columns of a shard, and a row as their values and back.

Plain columns can be read by any Parquet reader: a shard is an SFT dataset without our code. Each codec stream is a
`binary` column, one frame per row, so that a row can be decoded alone.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from coldstill.storage_schema.codec import STREAMS, RowCodec
from coldstill.storage_schema.errors import InvalidRow
from coldstill.storage_schema.parquet.fields import list_of, required
from coldstill.storage_schema.rows import CachedRow

MAX_METADATA_BYTES = 1 << 20


_MEDIA = pa.struct(
    [
        required("position", pa.int32()),
        required("type", pa.string()),
        required("sha256", pa.string()),
        pa.field("path", pa.string()),
        pa.field("bytes", pa.binary()),
    ]
)

PLAIN_COLUMNS = ("sample_id", "token_ids", "target_spans", "metadata", "media")
SCHEMA = pa.schema(
    [
        required("sample_id", pa.string()),
        required("token_ids", list_of(pa.int32())),
        required("target_spans", list_of(pa.int32())),
        required("metadata", pa.string()),
        required("media", list_of(_MEDIA)),
        *(required(name, pa.binary()) for name in STREAMS),
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
