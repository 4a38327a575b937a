"""`coldstill export axolotl`: a sealed dataset in, Parquet files out that axolotl's KD trainer takes as they are.

Columns: `input_ids`, `attention_mask`, `labels` (axolotl takes a dataset with these three as tokenised), and
`target_token_ids`, `target_logprobs`, `target_mask`, one list of K per token, as after its preprocessing; `sample_id`
and `metadata` beside them. Row `p` is about token `p + 1`, as its loss has read it since commit ccc94da (see
`axolotl_rows.py`): nothing is to be shifted. `labels` is -100 for each token that is no target; it is not shifted
either, as everywhere in transformers. A position that is no target has ids 0..K-1, log-prob -inf and mask 0; so has an
entry that a ragged position does not use, but for its id.

Log-probs are those of the full softmax at temperature 1: train with `kd_temperature: 1.0`, and with
`kd_normalize_topk: false` so that the student's are too. Tail mass, the label's log-prob outside the kept ids and tail
draws have no place in the layout and are left out; a row with images is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.rows import CachedRow

from .errors import NotExportable
from .writing import FILE_BYTES, nested, write_parquet

SCHEMA = pa.schema(
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


def export_axolotl(
    root: str | Path, output: str | Path, *, file_bytes: int = FILE_BYTES, progress: bool = True
) -> list[str]:
    """Write the dataset at `root` to the empty or new folder `output`; the names of the files, one or more per shard.

    Raises `NotExportable` for a row with images, `OutputNotEmpty`, `StorageFailed`, and what `open_dataset` raises.
    """
    dataset = open_dataset(root)
    return write_parquet(dataset, output, schema=SCHEMA, to_columns=_columns, file_bytes=file_bytes, progress=progress)


def _columns(row: CachedRow) -> dict[str, Any]:
    if row.media:
        raise NotExportable(
            f"row {row.sample_id!r}: media", found="images", wanted="text only", fix="export a subset without images"
        )
    tokens, targets, positions = row.token_ids.size, row.targets.by_probability(), row.positions
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
        "metadata": json.dumps(row.metadata, ensure_ascii=False, sort_keys=True),
    }
