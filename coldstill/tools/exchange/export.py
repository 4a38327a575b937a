"""`coldstill export`: write a dataset as Parquet files in the layouts of other tools.

`plain`: everything, decoded, for any Parquet reader. `axolotl`: the layout of axolotl's KD trainer. A layout is a
schema and a function from a `CachedRow` to its columns. Files have bounded size, and are written with
`compression="zstd"` as one string: pyarrow matches a dict of settings on full leaf paths, and would leave nested
columns uncompressed.

Shape letters: `T` tokens of a row, `N` its target positions, `K` teacher top-k.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.common.progress import tqdm
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.tools.errors import NotExportable, OutputNotEmpty

FILE_BYTES = 256 << 20
"""A file is closed once it reaches this size."""

GROUP_BYTES = 8 << 20
"""Size of a row group before compression: what a reader has in memory at once."""

MAX_AXOLOTL_ENTRIES = 1 << 25
"""Maximum number of entries of a row in axolotl's layout, 300 MB: the format bounds targets x K, not tokens x K."""

MAX_ID = 200
FOOTER_KEY = "coldstill"

MEDIA = pa.struct(
    [
        ("position", pa.int32()),
        ("type", pa.string()),
        ("sha256", pa.string()),
        ("path", pa.string()),
        ("data", pa.binary()),
    ]
)
PLAIN_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("target_positions", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.list_(pa.int32()))),
        ("logprobs", pa.list_(pa.list_(pa.float32()))),
        ("log_tail", pa.list_(pa.float32())),
        ("label_logprob", pa.list_(pa.float32())),
        ("draw_ids", pa.list_(pa.list_(pa.int32()))),
        ("draw_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("media", pa.list_(MEDIA)),
        ("metadata", pa.string()),
    ]
)

AXOLOTL_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("attention_mask", pa.list_(pa.int8())),
        ("labels", pa.list_(pa.int32())),
        ("target_token_ids", pa.list_(pa.list_(pa.int32()))),
        ("target_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("target_mask", pa.list_(pa.list_(pa.int8()))),
        ("metadata", pa.string()),
    ]
)


def export_plain(
    root: str | Path, output: str | Path, *, file_bytes: int = FILE_BYTES, progress: bool = True
) -> list[str]:
    """Write the dataset at `root` to the empty or new folder `output`; the names of the files, one or more per shard.

    One Parquet row per sequence:

    - `sample_id` string, `token_ids` list of `T` int32, `metadata` string: a JSON object
    - `target_positions` list of `N` int32: item `n` of the lists below is the teacher's distribution of token
      `target_positions[n] + 1`, given tokens `0..target_positions[n]`
    - `ids` list of `N` lists of int32, `logprobs` list of `N` lists of float32: the kept ids, most probable first, and
      their natural log-probs in the full softmax at temperature 1
    - `log_tail` list of `N` float32: log of the mass outside the kept ids
    - `label_logprob` list of `N` float32: log-prob of the token that follows in the text
    - `draw_ids` list of `N` lists of int32: the stored tail draws, repeats included; `draw_logprobs` likewise, null if
      the dataset does not hold them
    - `media` list of (position, type, sha256, path, data): images behind placeholder tokens; `path` is a file of the
      output, written once

    Log-probs are decoded values. The guarantee of the codec is in the header, which each file holds in its footer under
    the key `coldstill`.

    Raises `OutputNotEmpty`, `StorageFailed`, and what `open_dataset` and `Dataset.media_content` raise.
    """
    dataset, store = open_dataset(root), Store(output)
    written: set[str] = set()

    def to_columns(row: CachedRow) -> dict[str, Any]:
        for item in row.media:
            if item.path is not None and item.path not in written:
                store.put(item.path, dataset.media_content(item))
                written.add(item.path)
        return _plain_columns(row)

    return write_parquet(
        dataset,
        output,
        schema=PLAIN_SCHEMA,
        to_columns=to_columns,
        file_bytes=file_bytes,
        progress=progress,
    )


def _plain_columns(row: CachedRow) -> dict[str, Any]:
    targets = row.targets.by_probability()
    draw_logprobs = targets.draw_logprobs
    return {
        "sample_id": row.sample_id,
        "token_ids": row.token_ids,
        "target_positions": row.positions.astype(np.int32),
        "ids": nested(targets.ids[targets.kept], targets.counts),
        "logprobs": nested(targets.logprobs[targets.kept], targets.counts),
        "log_tail": targets.log_tail,
        "label_logprob": targets.label_logprob,
        "draw_ids": nested(targets.draw_ids, targets.draw_counts),
        "draw_logprobs": None if draw_logprobs is None else nested(draw_logprobs, targets.draw_counts),
        "media": pa.array([dataclasses.asdict(one) for one in row.media], MEDIA),
        "metadata": _metadata(row),
    }


def _metadata(row: CachedRow) -> str:
    """The metadata as JSON. A lone surrogate, which no file can hold, stays an escape."""
    text = json.dumps(row.metadata, ensure_ascii=False, sort_keys=True)
    return text if text.isascii() or _is_encodable(text) else json.dumps(row.metadata, sort_keys=True)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def export_axolotl(
    root: str | Path, output: str | Path, *, file_bytes: int = FILE_BYTES, progress: bool = True
) -> list[str]:
    """Write the dataset at `root` to the empty or new folder `output`; the names of the files, one or more per shard.

    Columns: `input_ids`, `attention_mask`, `labels` (axolotl treats a dataset with these three as tokenized);
    `target_token_ids`, `target_logprobs`, `target_mask`, one list of K per token, as after its preprocessing;
    `sample_id` and `metadata`. List `p` is about token `p + 1`, as axolotl's loss reads it since commit ccc94da (see
    `axolotl_rows.py`). `labels` is -100 for each token that is not a target, and is not shifted, as everywhere in
    transformers. A position that is not a target has ids 0..K-1, log-probs -inf and mask 0. Entries that a ragged
    position does not use have log-prob -inf and mask 0.

    Log-probs are those of the full softmax at temperature 1: train with `kd_temperature: 1.0`, and with
    `kd_normalize_topk: false` so that the student's are too. The layout has no place for tail mass, tail draws, and the
    label's log-prob outside the kept ids: they are left out.

    Raises `NotExportable` for a row with images, `OutputNotEmpty`, `StorageFailed`, and what `open_dataset` raises.
    """
    dataset = open_dataset(root)
    return write_parquet(
        dataset, output, schema=AXOLOTL_SCHEMA, to_columns=_axolotl_columns, file_bytes=file_bytes, progress=progress
    )


def _axolotl_columns(row: CachedRow) -> dict[str, Any]:
    if row.media:
        raise NotExportable(
            f"row {row.sample_id[:MAX_ID]!r}: media",
            found="images",
            wanted="text only",
            fix="make a subset without such rows (--filter 'media == 0'), and export that",
        )
    tokens, targets, positions = row.token_ids.size, row.targets.by_probability(), row.positions
    if tokens * targets.top_k > MAX_AXOLOTL_ENTRIES:
        raise NotExportable(
            f"row {row.sample_id[:MAX_ID]!r}: tokens x K",
            found=f"{tokens:,} x {targets.top_k:,}",
            wanted=f"at most {MAX_AXOLOTL_ENTRIES:,}: the layout has K entries at each token, target or not",
            fix="make a subset without such rows (--filter 'tokens <= N'), and export that",
        )
    labels = np.full(tokens, -100, np.int32)
    labels[positions + 1] = row.labels
    ids = np.tile(np.arange(targets.top_k, dtype=np.int32), (tokens, 1))
    logprobs = np.full((tokens, targets.top_k), -np.inf, np.float32)
    mask = np.zeros((tokens, targets.top_k), np.int8)
    ids[positions], logprobs[positions] = targets.ids, targets.logprobs
    mask[positions] = targets.kept
    return {
        "sample_id": row.sample_id,
        "input_ids": row.token_ids,
        "attention_mask": np.ones(tokens, np.int8),
        "labels": labels,
        "target_token_ids": nested(ids),
        "target_logprobs": nested(logprobs),
        "target_mask": nested(mask),
        "metadata": _metadata(row),
    }


def nested(values: np.ndarray, lengths: np.ndarray | None = None) -> pa.Array:
    """A row's list of lists, from `values [n, W]`, or from flat values and the `lengths [n]` of the inner lists."""
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
    """Write the columns of all rows, at least one file per shard that has rows; the names of the files in order.

    A file appears whole or not at all, as `UUUUUU-PPP.parquet` (unit, part), with the dataset's header in its footer.
    Raises `OutputNotEmpty`, `UnsupportedStore`, `StorageFailed`.
    """
    store = Store(output)
    store.require_writable()
    if store.fs.exists(store.root) and store.fs.ls(store.root, detail=False):
        raise OutputNotEmpty(
            store.url, found="a folder with files in it", wanted="an empty or new folder", fix="choose another folder"
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
    store.delete_folder(RUN_FOLDER)
    return names


def _groups(records: Iterator[dict[str, Any]], schema: pa.Schema, bar: Any) -> Iterator[pa.Table]:
    group: list[dict[str, Any]] = []
    size = 0
    for record in records:
        group.append(record)
        size += sum(len(value) if isinstance(value, str) else getattr(value, "nbytes", 0) for value in record.values())
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
    """A column from one value per row. Lists are joined end to end; no number becomes a Python object."""
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
