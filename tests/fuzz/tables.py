"""Parquet files with other columns, types, encodings or compression than those of the format."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_OPTIONS: tuple[dict[str, Any], ...] = (
    {"compression": "none"}, {"compression": "snappy"}, {"compression": "gzip"}, {"compression": "lz4"},
    {"compression": "brotli"}, {"compression": "zstd"}, {"use_dictionary": True}, {"data_page_version": "2.0"},
    {"write_page_checksum": False}, {"data_page_size": 1, "write_batch_size": 1}, {"store_schema": True},
    {"write_page_index": True}, {"write_statistics": True}, {"use_dictionary": True, "data_page_size": 16},
    {"use_dictionary": False, "use_byte_stream_split": True, "compression": "none"},
    {"use_dictionary": False, "column_encoding": {"sample_id": "DELTA_BYTE_ARRAY"}},
    {"use_dictionary": False, "column_encoding": {"token_ids.list.element": "DELTA_BINARY_PACKED"}},
    {"use_compliant_nested_type": False}, {"version": "1.0"}, {"sorting_columns": [pq.SortingColumn(0)]},
)  # fmt: skip


def change(rng: random.Random, data: bytes) -> bytes:
    """The table in `data` with another schema, or written in another way, footer's header included."""
    file = pq.ParquetFile(io.BytesIO(data))
    table = file.read()
    header = (file.metadata.metadata or {}).get(b"coldstill")
    options = rng.choice(_OPTIONS) if rng.random() < 0.6 else {}
    if not options or rng.random() < 0.2:
        table = rng.choice(_SCHEMA_CHANGES)(rng, table)
    for settings in (options, {}):
        sink = io.BytesIO()
        try:
            with pq.ParquetWriter(sink, table.schema, **settings) as writer:
                writer.write_table(table, row_group_size=rng.choice((1, 2, 1024)))
                if header is not None:
                    writer.add_key_value_metadata({"coldstill": header})
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            TypeError,
        ):  # an encoding that the writer has not for these columns
            continue
        return sink.getvalue()
    return data


def _column(rng: random.Random, table: pa.Table) -> tuple[int, pa.Field]:
    place = rng.randrange(table.num_columns)
    return place, table.schema.field(place)


def _extra(rng: random.Random, table: pa.Table) -> pa.Table:
    return table.append_column(rng.choice(("surprise", "ids", "")), pa.array([b"x"] * table.num_rows))


def _missing(rng: random.Random, table: pa.Table) -> pa.Table:
    return table.remove_column(_column(rng, table)[0])


def _reordered(rng: random.Random, table: pa.Table) -> pa.Table:
    names = table.column_names
    rng.shuffle(names)
    return table.select(names)


def _renamed(rng: random.Random, table: pa.Table) -> pa.Table:
    first, second = _column(rng, table)[0], _column(rng, table)[0]
    names = table.column_names
    names[first], names[second] = names[second], names[first]
    return table.rename_columns(names)


def _nulls(rng: random.Random, table: pa.Table) -> pa.Table:
    place, field = _column(rng, table)
    values = [None if rng.random() < 0.5 else value for value in table.column(place).to_pylist()]
    return table.set_column(place, field.with_nullable(True), pa.array(values, field.type))


def _other_type(rng: random.Random, table: pa.Table) -> pa.Table:
    place, field = _column(rng, table)
    kinds = (
        pa.large_string(), pa.large_binary(), pa.string(), pa.binary(), pa.int64(), pa.int32(), pa.float64(),
        pa.list_(pa.int32()), pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.null(), pa.binary(5), pa.bool_(),
        pa.timestamp("ns"), pa.decimal128(20, 2), pa.dictionary(pa.int32(), pa.string()),
        pa.map_(pa.string(), pa.int8()),
    )  # fmt: skip
    kind = rng.choice(kinds)
    try:
        column = table.column(place).cast(kind, safe=False)
    except (pa.ArrowException, ValueError):
        column = pa.nulls(table.num_rows, kind)
    return table.set_column(place, pa.field(field.name, kind, nullable=True), column)


def _twice(rng: random.Random, table: pa.Table) -> pa.Table:
    return pa.concat_tables([table] * rng.choice((2, 40)))


def _none(rng: random.Random, table: pa.Table) -> pa.Table:
    return table.slice(0, 0)


_SCHEMA_CHANGES: tuple[Callable[[random.Random, pa.Table], pa.Table], ...] = (
    _extra, _missing, _reordered, _renamed, _nulls, _other_type, _other_type, _twice, _none,
)  # fmt: skip
