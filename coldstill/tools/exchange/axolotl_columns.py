"""The columns of axolotl's KD layout: one row of them in, padded arrays out; and a JSON line as one such row.

Shape letters: `n` lists of a row, `W` entries of its widest list.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .cells import check_size, nested_of, numbers
from .errors import UnusableRow

_NUMBER_LISTS = pa.list_(pa.list_(pa.float64()))
_ID_LISTS = pa.list_(pa.list_(pa.int64()))
_TOKEN_LISTS = pa.list_(pa.list_(pa.struct([("token", pa.string()), ("logprob", pa.float64())])))


class Entries(NamedTuple):
    """What a row holds at consecutive positions: `ids int64`, `logprobs float64`, `present bool`, each `[n, W]`;
    `masked bool [n]`: the position has a mask and all of it is 0."""

    ids: np.ndarray
    logprobs: np.ndarray
    present: np.ndarray
    masked: np.ndarray


def entries_of(table: pa.RecordBatch, index: int, values_name: str) -> Entries:
    found = nested_of(table, index, values_name)
    if found is None or found[1].max(initial=0) == 0:
        raise UnusableRow(values_name, found="nothing", wanted="lists of log-probs per position")
    flat, lengths = found
    mask = None
    if pa.types.is_struct(flat.type):
        ids, logprobs = _parsed(flat, values_name)
    else:
        logprobs = numbers(flat, values_name)
        beside = _beside(table, index, "target_token_ids", lengths, values_name)
        if beside is None:
            raise UnusableRow("target_token_ids", found="nothing", wanted=f"an id for each value of {values_name}")
        ids = beside
        mask = _beside(table, index, "target_mask", lengths, values_name)
    check_size(values_name, positions=lengths.size, width=int(lengths.max()))
    used = np.arange(lengths.max()) < lengths[:, None]
    in_mask: np.ndarray = used if mask is None else np.not_equal(_spread(mask, used, 0), 0)
    masked: np.ndarray = np.zeros(lengths.size, bool) if mask is None else np.logical_not(in_mask.any(axis=1))
    return Entries(
        ids=_spread(ids, used, 0).astype(np.int64),
        logprobs=_spread(logprobs, used, -np.inf).astype(np.float64),
        present=np.where(masked[:, None], used, in_mask),
        masked=masked,
    )


def _beside(table: pa.RecordBatch, index: int, name: str, lengths: np.ndarray, values_name: str) -> np.ndarray | None:
    """The flat numbers of a column that must have as many at each position as the values have."""
    found = nested_of(table, index, name)
    if found is None:
        return None
    if not np.array_equal(found[1], lengths):
        raise UnusableRow(name, found="other lengths", wanted=f"as many entries at each position as {values_name}")
    return numbers(found[0], name)


def _spread(flat: np.ndarray, used: np.ndarray, rest: float) -> np.ndarray:
    """Flat numbers as `[n, W]`, `rest` where a position has fewer."""
    full = np.full(used.shape, rest, np.result_type(flat.dtype, type(rest)))
    full[used] = flat
    return full


def _parsed(flat: pa.Array, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs of `{"token": "token_id:N", "logprob": x}`."""
    names = {field.name for field in flat.type}
    if flat.null_count or not {"token", "logprob"} <= names:
        raise UnusableRow(name, found=f"entries with {sorted(names)}", wanted="entries with token and logprob")
    tokens, logprobs = (flat.field(key) for key in ("token", "logprob"))
    if not (pa.types.is_string(tokens.type) or pa.types.is_large_string(tokens.type)):
        raise UnusableRow(f"{name}: token", found=str(tokens.type), wanted="strings `token_id:N`")
    ids = pc.struct_field(pc.extract_regex(tokens, r"^token_id:(?P<id>[0-9]{1,9})$"), "id")
    if ids.null_count:
        wrong = tokens[int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])].as_py()
        raise UnusableRow(
            f"{name}: token",
            found=repr(wrong)[:80],
            wanted="`token_id:N`",
            fix="capture with vLLM's return_tokens_as_token_ids: text does not say which id it was",
        )
    return ids.cast(pa.int64()).to_numpy(zero_copy_only=False), numbers(logprobs, name)


def table_of(document: dict[str, Any], *, logprobs_field: str) -> pa.RecordBatch:
    """One JSON row with the columns of a Parquet file."""
    lists = document.get(logprobs_field) or ()
    some = next((entry for position in lists for entry in position or ()), None)
    metadata = document.get("metadata")
    columns = {
        "sample_id": (str(document["sample_id"]) if "sample_id" in document else None, pa.string()),
        "id": (str(document["id"]) if "id" in document else None, pa.string()),
        "metadata": (metadata if metadata is None or isinstance(metadata, str) else json.dumps(metadata), pa.string()),
        "input_ids": (document.get("input_ids"), pa.list_(pa.int64())),
        "labels": (document.get("labels"), pa.list_(pa.int64())),
        "target_token_ids": (document.get("target_token_ids"), _ID_LISTS),
        "target_mask": (document.get("target_mask"), _ID_LISTS),
        "target_logprobs": (document.get("target_logprobs"), _NUMBER_LISTS),
        logprobs_field: (document.get(logprobs_field), _TOKEN_LISTS if isinstance(some, dict) else _NUMBER_LISTS),
    }
    there = {name: pa.array([value], kind) for name, (value, kind) in columns.items() if value is not None}
    return pa.RecordBatch.from_pydict(there)


def metadata_of(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise UnusableRow("metadata", found="no JSON", wanted="a JSON object") from None
    if not isinstance(found, dict):
        raise UnusableRow("metadata", found=type(found).__name__, wanted="a JSON object")
    return found
