"""Shards with changed rows (a stream, an id, a span, a text) in a valid Parquet file."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.storage_schema.codec import STREAMS
from coldstill.storage_schema.shard import SCHEMA

from . import frames
from .byte_changes import INTERESTING

Rows = list[dict[str, Any]]

_INT32 = tuple(value for value in INTERESTING if -(1 << 31) <= value < 1 << 31)
_METADATA = (
    "", "null", "[]", "1", '"text"', "NaN", "{", '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "9" * 5000 + "}",
    '{"a": ' + "[" * 5000 + "]" * 5000 + "}", "[" * 200_000, '{"a": "\\ud800"}', '{"a": 1, "a": 2}', '{"\\u0000": 1}',
    '{"a": "<script>alert(1)</script>"}', '{"a": ' + "[" + "[]," * 50_000 + "1]}", '{"a": "' + "x" * (1 << 20) + '"}',
)  # fmt: skip
_TEXTS = (
    "", "x" * 70_000, "a\x00b", "<script>", "../x", "\u202e", "é" * 999, "row\n2",
    b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"a\xf8\x88\x80\x80\x80", b"\xc3",
)  # fmt: skip


def rows_of(data: bytes) -> Rows:
    """The rows of a sound shard, as values of Python."""
    rows: Rows = pq.read_table(io.BytesIO(data)).to_pylist()
    return rows


def header_of(data: bytes) -> bytes:
    """The header in the footer of a sound shard."""
    return bytes(pq.ParquetFile(io.BytesIO(data)).metadata.metadata[b"coldstill"])


def write_rows(rows: Rows, *, header: bytes, group_rows: int = 1024) -> bytes:
    """A shard of values that obey no law but the types of their columns."""
    columns = [_column([row[field.name] for row in rows], field) for field in SCHEMA]
    return write_table(pa.Table.from_arrays(columns, schema=SCHEMA), header=header, group_rows=group_rows)


def write_table(table: pa.Table, *, header: bytes, group_rows: int = 1024, **options: Any) -> bytes:
    """A Parquet file written as shards are, but for `options` of pyarrow's writer."""
    sink = io.BytesIO()
    paths = [
        "sample_id", "token_ids.list.element", "target_spans.list.element", "metadata",
        *(f"media.list.element.{name}" for name in ("position", "type", "sha256", "path", "bytes")),
    ]  # fmt: skip
    settings = {
        "compression": {**dict.fromkeys(STREAMS, "none"), **dict.fromkeys(paths, "zstd")},
        "use_dictionary": False,
        "write_statistics": ["sample_id"],
        "write_page_checksum": True,
        "store_schema": False,
        **options,
    }
    with pq.ParquetWriter(sink, table.schema, **settings) as writer:
        writer.write_table(table, row_group_size=group_rows)
        writer.add_key_value_metadata({"coldstill": header})
    return sink.getvalue()


def _column(values: list[Any], field: pa.Field) -> pa.Array:
    if field.type == pa.string():  # texts may be bytes that are no UTF-8
        raw = [value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value for value in values]
        return pa.array(raw, pa.binary()).view(pa.string())
    return pa.array(values, field.type)


def change(rng: random.Random, rows: Rows) -> None:
    """One change to the rows, in place."""
    rng.choice(_CHANGES)(rng, rows)


def change_frame(rng: random.Random, rows: Rows) -> None:
    """Another frame in one to three streams of one row."""
    row = rng.choice(rows)
    for name in rng.sample(STREAMS, rng.choice((1, 1, 1, 2, 3))):
        row[name] = frames.change(rng, row[name])


def swap_streams(rng: random.Random, rows: Rows) -> None:
    """The same frame in another row or another column."""
    first, second = rng.choice(rows), rng.choice(rows)
    if rng.random() < 0.5:
        one = other = rng.choice(STREAMS)
    else:
        one, other = rng.choice(STREAMS), rng.choice(STREAMS)
    first[one], second[other] = second[other], first[one]


def order_rows(rng: random.Random, rows: Rows) -> None:
    """Rows in another order, twice, or left out."""
    place = rng.randrange(len(rows))
    rng.choice((rows.reverse, lambda: rows.append(dict(rows[place])), lambda: rows.pop(place), rows.clear))()


def change_tokens(rng: random.Random, rows: Rows) -> None:
    """Ids out of bounds, or a row of another length."""
    row = rng.choice(rows)
    row["token_ids"] = _numbers(rng, row["token_ids"])


def change_spans(rng: random.Random, rows: Rows) -> None:
    """Spans that overlap, descend, leave the row, are half, or are many."""
    row = rng.choice(rows)
    row["target_spans"] = _numbers(rng, row["target_spans"])


def _numbers(rng: random.Random, values: list[int]) -> list[int]:
    place = rng.randrange(len(values))
    value = rng.choice((*_INT32, values[place] + 1, values[place] - 1))
    return rng.choice(
        (
            [*values[:place], max(-(1 << 31), min(value, (1 << 31) - 1)), *values[place + 1 :]],
            values[:place],
            values + values,
            values[::-1],
            values[:1],
            [],
            [0] * rng.choice((2, 63, 64, 65, 3000)),
            list(range(200)),
        )
    )


def change_texts(rng: random.Random, rows: Rows) -> None:
    """Metadata that are no object, sample ids that are no text."""
    row = rng.choice(rows)
    if rng.random() < 0.7:
        row["metadata"] = rng.choice((*_METADATA, *_TEXTS))
    else:
        row["sample_id"] = rng.choice((*_METADATA, *_TEXTS))


def change_media(rng: random.Random, rows: Rows) -> None:
    """A reference with another position, type, digest, path or content; none, or many."""
    row = rng.choice(rows)
    sound = {"position": 1, "type": "image/png", "sha256": "0" * 64, "path": "media/cat.png", "bytes": None}
    item = {**sound, **(row["media"][-1] if row["media"] else {})}
    name = rng.choice(("position", "type", "sha256", "path", "bytes"))
    texts = (
        *("", "../x", "media/../x", "/etc/passwd", "media/none.png", "a\x00b", "text/html\n", "x" * 9000, "0" * 64),
        *("text/html", "image/svg+xml", "image/jpeg", "media/NUL.png", "media/a.", "dataset.json"),
    )
    item[name] = {
        "position": rng.choice(_INT32),
        "bytes": rng.choice((None, b"", b"<svg onload=alert(1)>", bytes(100_000))),
        "path": rng.choice((None, *texts)),
    }.get(name, rng.choice(texts))
    last = [*row["media"][:-1], item]
    row["media"] = rng.choice(([item], [*row["media"], item], [item] * 300, [sound, item], last, row["media"][1:]))


_CHANGES: tuple[Callable[[random.Random, Rows], None], ...] = (
    change_frame, swap_streams, order_rows, change_tokens, change_spans, change_texts, change_media,
)  # fmt: skip
