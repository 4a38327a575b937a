"""Rows of axolotl's KD layout, as columns or JSON lines, to `CachedRow`.

Shape letters: `n` lists of a row, `W` entries of its widest list.

ALIGNMENT is not stored in the files, and it has changed. Until June 2025 axolotl's trainer compared the student at `p`
with list `p + 1` (`target_logprobs[..., 1:, :]`), so list `p` was about token `p` itself: `predicts="same"`. Since
commit ccc94da the loss compares list `p` with the student at `p` and shifts only the labels (`kernels/liger.py`), so
list `p` must be about token `p + 1`: `predicts="next"`. Its vLLM client was changed to match ("shift off the first
empty token"); its offline preprocessing and its sglang client were not. Prepared columns are therefore read as `next`
and raw lists as `same`, and `check_alignment` rejects the import if the first rows contradict that. The list about
token `t + 1` becomes target `t`; lists about token 0, or about a token past the end, are dropped.

A token is a target if its label is not -100; without `labels`, if `target_mask` is set; without both, if its list has
entries. A target without a distribution is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coldstill.storage_schema.rows import CachedRow, span_positions, spans_from_mask
from coldstill.tools.errors import NotFullSoftmax, SourceUnreadable, UnusableRow

from .derived_targets import ABSENT_LOGPROB, derived_targets
from .importing import ImportedRow
from .input_files import Tables, check_size, check_token_ids, nested_of, numbers, text_of, values_of

Predicts = Literal["next", "same"]

_NUMBER_LISTS = pa.list_(pa.list_(pa.float64()))
_ID_LISTS = pa.list_(pa.list_(pa.int64()))
_TOKEN_LISTS = pa.list_(pa.list_(pa.struct([("token", pa.string()), ("logprob", pa.float64())])))


class AxolotlRows:
    """The rows of all files, aligned. `top_k`: as given, or as many entries as the first row with any has."""

    def __init__(
        self,
        tables: Tables,
        *,
        prepared: bool,
        predicts: Predicts,
        logprobs_field: str,
        token_count: int,
        top_k: int | None,
        renormalized: bool = False,
    ):
        self._tables, self._prepared, self._logprobs = tables, prepared, logprobs_field
        self._renormalized = renormalized
        self.predicts, self.token_count = predicts, token_count
        self.top_k = min(top_k or self._first_width(), token_count)

    def __len__(self) -> int:
        """Rows of all files."""
        return len(self._tables)

    def items(self, start: int) -> Iterator[ImportedRow]:
        """Rows from number `start` on."""
        columns = (
            "sample_id",
            "id",
            "metadata",
            "input_ids",
            "labels",
            self._values,
            "target_token_ids",
            "target_mask",
        )
        for file, first_row, table in self._tables.batches(start, columns=columns):
            if isinstance(table, UnusableRow):
                yield ImportedRow(f"{file.stem}-{first_row}", table)
                continue
            for index in range(table.num_rows):
                name = f"{file.stem}-{first_row + index}"
                where = f"{file.name}, row {first_row + index}"
                try:
                    name = text_of(table, index, "sample_id") or text_of(table, index, "id") or name
                    yield self._row(table, index, name)
                except NotFullSoftmax as error:
                    raise error.at(where) from None
                except UnusableRow as error:
                    yield ImportedRow(name, error.at(where))

    @property
    def _values(self) -> str:
        return "target_logprobs" if self._prepared else self._logprobs

    def _first_width(self) -> int:
        for _, _, table in self._tables.batches(0, columns=(self._values,)):
            found = None if isinstance(table, UnusableRow) else nested_of(table, 0, self._values)
            if found is not None and found[1].max(initial=0) > 0:
                widths = found[1][found[1] > 0]
                # vLLM adds an entry where the actual token is not among the first K: that one is not of the top K.
                extra = int(widths.max()) - int(widths.min()) == 1
                return int(widths.min() if extra else widths.max())
        raise SourceUnreadable(self._values, found="no row with entries", wanted="lists of log-probs per position")

    def _row(self, table: pa.RecordBatch, index: int, name: str) -> ImportedRow:
        token_ids = values_of(table, index, "input_ids")
        if token_ids is None or token_ids.size < 2:
            raise UnusableRow("input_ids", found="nothing" if token_ids is None else "one token", wanted="two or more")
        check_token_ids(token_ids, token_count=self.token_count)
        labels = values_of(table, index, "labels")
        if labels is not None and labels.size != token_ids.size:
            raise UnusableRow("labels", found=f"{labels.size} values", wanted=f"{token_ids.size}, one per token")
        entries = entries_of(table, index, self._values)
        about = self._first_token(len(entries.ids), token_ids.size) + np.arange(len(entries.ids))
        has_entry = (entries.present & ~(entries.logprobs <= ABSENT_LOGPROB)).any(axis=1)
        usable = has_entry & (about >= 1) & (about < token_ids.size)
        if labels is None:
            loss_mask = np.zeros(token_ids.size, bool)
            loss_mask[about[usable & ~entries.masked]] = True
        else:
            loss_mask = labels != -100
        spans = spans_from_mask(loss_mask)
        positions = span_positions(spans)
        if positions.size == 0:
            raise UnusableRow("targets", found="no target token with a distribution", wanted="at least one")
        place = np.full(token_ids.size, -1)
        place[about[usable]] = np.flatnonzero(usable)
        chosen = place[positions + 1]
        if (chosen < 0).any():
            raise UnusableRow(
                f"token {int(positions[(chosen < 0).argmax()]) + 1}",
                found=f"no distribution, as for {int((chosen < 0).sum())} of {chosen.size} target tokens",
                wanted="one for each target token",
                fix="mask these tokens in `labels`, or check which token a list is about (--predicts)",
            )
        token_ids = token_ids.astype(np.int32)
        targets = derived_targets(
            entries.ids[chosen],
            entries.logprobs[chosen],
            present=entries.present[chosen],
            labels=token_ids[positions + 1],
            token_count=self.token_count,
            top_k=self.top_k,
            renormalized=self._renormalized,
        )
        row = CachedRow(
            sample_id=name,
            token_ids=token_ids,
            target_spans=spans,
            targets=targets,
            metadata=metadata_of(text_of(table, index, "metadata")),
        )
        values = np.where(entries.present[chosen], entries.logprobs[chosen], -np.inf)
        return ImportedRow(name, row, values)

    def _first_token(self, count: int, tokens: int) -> int:
        """The number of the token that the first of `count` lists is about."""
        shift = 1 if self.predicts == "next" else 0
        if self._prepared and count not in (tokens, tokens - shift):
            raise UnusableRow("target_logprobs", found=f"{count} lists", wanted=f"{tokens}, one per token")
        if count > tokens:
            raise UnusableRow(self._values, found=f"{count} lists", wanted=f"at most {tokens}, one per token")
        return shift if self._prepared else tokens - count + shift


class Entries(NamedTuple):
    """The lists of a row: `ids int64`, `logprobs float64` and `present bool`, each `[n, W]`.

    `masked bool [n]`: the list has a mask, and all of it is 0.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    present: np.ndarray
    masked: np.ndarray


def entries_of(table: pa.RecordBatch, index: int, values_name: str) -> Entries:
    """The entries of one row, padded to its widest list. Raises `UnusableRow`."""
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
    """The flat numbers of a column that must have as many entries at each position as the values."""
    found = nested_of(table, index, name)
    if found is None:
        return None
    if not np.array_equal(found[1], lengths):
        raise UnusableRow(name, found="other lengths", wanted=f"as many entries at each position as {values_name}")
    return numbers(found[0], name)


def _spread(flat: np.ndarray, used: np.ndarray, rest: float) -> np.ndarray:
    """Flat numbers as `[n, W]`; positions with fewer entries are filled with `rest`."""
    full = np.full(used.shape, rest, np.result_type(flat.dtype, type(rest)))
    full[used] = flat
    return full


def _parsed(flat: pa.Array, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids and log-probs of entries `{"token": "token_id:N", "logprob": x}`."""
    names = {field.name for field in flat.type}
    if flat.null_count or not {"token", "logprob"} <= names:
        raise UnusableRow(name, found=f"entries with {sorted(names)}", wanted="entries with token and logprob")
    tokens, logprobs = (flat.field(key) for key in ("token", "logprob"))
    if not (pa.types.is_string(tokens.type) or pa.types.is_large_string(tokens.type)):
        raise UnusableRow(f"{name}: token", found=str(tokens.type), wanted="strings `token_id:N`")
    ids = pc.struct_field(pc.extract_regex(tokens, r"^token_id:(?P<id>[0-9]{1,9})$"), "id")
    if ids.null_count:
        wrong = tokens.cast(pa.large_binary())[int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])]
        raise UnusableRow(
            f"{name}: token",
            found=repr(wrong.as_py().decode(errors="backslashreplace"))[:80],
            wanted="`token_id:N`",
            fix="capture with vLLM's return_tokens_as_token_ids: several ids may have the same text",
        )
    return ids.cast(pa.int64()).to_numpy(zero_copy_only=False), numbers(logprobs, name)


def table_of(document: dict[str, Any], *, logprobs_field: str) -> pa.RecordBatch:
    """A JSON row as one row with the columns of a Parquet file."""
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
    present = {name: pa.array([value], kind) for name, (value, kind) in columns.items() if value is not None}
    return pa.RecordBatch.from_pydict(present)


def metadata_of(text: str | None) -> dict[str, Any]:
    """The JSON object in a metadata column; {} if it is null. Raises `UnusableRow`."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise UnusableRow("metadata", found="not JSON", wanted="a JSON object") from None
    if not isinstance(found, dict):
        raise UnusableRow("metadata", found=type(found).__name__, wanted="a JSON object")
    return found
