"""`coldstill export plain`: a sealed dataset in, Parquet files out that need no code of ours to read.

Shape letters: `T` tokens of a row, `N` its target positions. One Parquet row is one sequence:

- `sample_id` string, `token_ids` list of `T` int32, `metadata` string: a JSON object
- `target_positions` list of `N` int32: list `n` below is the teacher's distribution of token `target_positions[n] + 1`
  given tokens `0..target_positions[n]`
- `ids` list of `N` lists of int32, `logprobs` list of `N` lists of float32: the kept ids, most probable first, and the
  natural log of the full softmax at temperature 1
- `log_tail` list of `N` float32: log of the mass outside the kept ids
- `label_logprob` list of `N` float32: log-prob of the token that really follows
- `draw_ids` list of `N` lists of int32: the kept tail draws with their repeats; `draw_logprobs` beside it where the
  dataset has them
- `media` list of (position, type, sha256, path, data): images behind placeholder tokens; `path`: a file of the dataset

`log_tail`, `label_logprob` and the log-probs of a dataset are decoded values: its codec's guarantee is in the header,
which stands in each file's footer under `coldstill`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.rows import CachedRow

from .writing import FILE_BYTES, nested, write_parquet

MEDIA = pa.struct(
    [
        ("position", pa.int32()),
        ("type", pa.string()),
        ("sha256", pa.string()),
        ("path", pa.string()),
        ("data", pa.binary()),
    ]
)
SCHEMA = pa.schema(
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


def export_plain(
    root: str | Path, output: str | Path, *, file_bytes: int = FILE_BYTES, progress: bool = True
) -> list[str]:
    """Write the dataset at `root` to the empty or new folder `output`; the names of the files, one or more per shard.

    Raises `OutputNotEmpty`, `StorageFailed`, and what `open_dataset` raises.
    """
    return write_parquet(
        open_dataset(root), output, schema=SCHEMA, to_columns=_columns, file_bytes=file_bytes, progress=progress
    )


def _columns(row: CachedRow) -> dict[str, Any]:
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
        "metadata": json.dumps(row.metadata, ensure_ascii=False, sort_keys=True),
    }
