"""What both exports share: rows of a dataset in, Parquet files of bounded size out.

Files are written with `compression="zstd"` as one string: pyarrow matches a dict of settings on full leaf paths, so
that nested columns named in one would stay uncompressed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import Store

from .errors import OutputNotEmpty

FILE_BYTES = 256 << 20
"""A file is closed when it has reached this size."""

GROUP_BYTES = 8 << 20
"""Numbers of a row group before compression: what a reader needs at once."""

FOOTER_KEY = "coldstill"


def nested(values: np.ndarray, lengths: np.ndarray | None = None) -> pa.Array:
    """One row's list of lists: `values [n, W]`, or flat values with the `lengths [n]` of the inner lists."""
    lengths = np.full(len(values), values.shape[1]) if lengths is None else lengths
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


def write_parquet(
    dataset: Dataset,
    output: str | Path,
    *,
    schema: pa.Schema,
    to_columns: Callable[[CachedRow], dict[str, Any]],
    file_bytes: int,
    progress: bool,
) -> list[str]:
    """Write each row's columns, at least one file per shard that has rows; names of the files in order.

    A file appears whole or not at all, as `UUUUUU-PPP.parquet` (unit, part), with the dataset's header in its footer.
    Raises `OutputNotEmpty`, `UnsupportedStore`, `StorageFailed`.
    """
    store = Store(output)
    store.require_writable()
    if store.fs.exists(store.root) and store.fs.ls(store.root, detail=False):
        raise OutputNotEmpty(
            store.url, found="a folder with something in it", wanted="an empty or new folder", fix="choose another one"
        )
    names: list[str] = []
    first_row = 0
    with tqdm(total=len(dataset), desc="export", unit=" rows", disable=not progress) as bar:
        for shard in dataset.shards:
            rows = dataset.rows(first_row, first_row + shard.rows)
            first_row += shard.rows
            groups = _groups(map(to_columns, rows), schema, bar)
            for part, data in enumerate(_files(groups, schema, dataset.header, file_bytes)):
                names.append(f"{shard.unit:06d}-{part:03d}.parquet")
                store.put(names[-1], data)
    store.delete_folder("_run")
    return names


def _groups(records: Iterator[dict[str, Any]], schema: pa.Schema, bar: Any) -> Iterator[pa.Table]:
    group: list[dict[str, Any]] = []
    size = 0
    for record in records:
        group.append(record)
        size += sum(value.nbytes for value in record.values() if hasattr(value, "nbytes"))
        bar.update(1)
        if size >= GROUP_BYTES:
            yield _table(group, schema)
            group, size = [], 0
    if group:
        yield _table(group, schema)


def _table(group: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_arrays(
        [_column([record[field.name] for record in group], field.type) for field in schema], schema=schema
    )


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A column from one value per row; lists are joined end to end, no number passes through Python."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    absent = pa.array([value is None for value in values])
    if absent.true_count == len(values):
        return pa.nulls(len(values), kind)
    empty = pa.array([], kind.value_type)
    parts = [empty if value is None else pa.array(value).cast(kind.value_type) for value in values]
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in parts]))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.concat_arrays(parts), type=kind, mask=absent)


def _files(groups: Iterator[pa.Table], schema: pa.Schema, header: DatasetHeader, file_bytes: int) -> Iterator[bytes]:
    table = next(groups, None)
    while table is not None:
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
            while table is not None:
                writer.write_table(table, row_group_size=table.num_rows)
                table = next(groups, None)
                if sink.tell() >= file_bytes:
                    break
            writer.add_key_value_metadata({FOOTER_KEY: header.to_bytes()})
        yield sink.getvalue()
