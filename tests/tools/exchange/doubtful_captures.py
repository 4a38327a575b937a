"""Captures of a small teacher in each layout, with a change of its values, and their import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.tools.exchange.axolotl_import import import_axolotl
from coldstill.tools.exchange.distillkit_import import import_distillkit
from coldstill.tools.exchange.settings import AxolotlSettings, DistillKitSettings
from tests.tools.exchange import peers

K = 6
EXACT = {**peers.ALL_EXACT, "k": K, "exact_k": K}


def renormalized(values: np.ndarray) -> np.ndarray:
    """Log-probs scaled so that their probabilities sum to 1."""
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Each value as bfloat16 holds it."""
    return np.array([peers.as_stored(one, "bfloat16") for one in values.ravel()]).reshape(values.shape)


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda values: values,
    "float32": lambda values: values.astype(np.float32).astype(float),
    "float16": lambda values: values.astype(np.float16).astype(float),
    "bfloat16": bfloat16,
    "5 decimals": lambda values: np.round(values, 5),
    "3 decimals": lambda values: np.round(values, 3),
    "5 digits cut off": lambda values: np.trunc(values * 1e5) / 1e5,
    "float16, then 3 decimals": lambda values: np.round(values.astype(np.float16).astype(float), 3),
}


def written(
    folder: Path, texts: list[peers.Sequence], change: Callable[[np.ndarray], np.ndarray], *, layout: str
) -> Path:
    """The teacher's top K of each position after `change`, which takes the values `[T, K]` of a text."""
    folder.mkdir()
    rows = []
    for text in texts:
        ids = np.argsort(-text.logprobs, axis=1, kind="stable")[:-1, :K]
        values = change(np.take_along_axis(text.logprobs[:-1], ids, axis=1))
        named = ("target_token_ids", "logprobs") if layout == "axolotl" else ("token_ids", "top_values")
        if layout == "distillkit":
            data = [[b for v in one for b in peers.float_bytes(float(v), "float32")] for one in values]
            packed = [list(peers.bit_stream(one.tolist(), 8)) for one in ids]
            rows.append({"input_ids": text.tokens.tolist(), "compressed_logprobs": data, "bytepacked_indices": packed})
        else:
            rows.append({"input_ids": text.tokens.tolist(), named[0]: ids.tolist(), named[1]: values.tolist()})
    if layout == "axolotl":
        return peers.write_jsonl(folder / "in.jsonl", rows)
    if layout == "distillkit":
        return peers.write_distillkit(folder, rows, EXACT, per_file=100)
    pq.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    return folder


def run(source: Path, output: Path, tokenizer: Path, *, layout: str = "axolotl", **changes: Any) -> Dataset:
    """The import of either tool's layout, quietly."""
    fields = {"tokenizer": tokenizer, "teacher": "peer/teacher", "fidelity": "exact", **changes}
    if layout == "axolotl":
        import_axolotl(source, output, AxolotlSettings.model_validate(fields), progress=False)
    else:
        import_distillkit(source, output, DistillKitSettings.model_validate(fields), progress=False)
    return open_dataset(output)
