"""Rows of a DistillKit capture to `CachedRow`, one per document.

Shape letters: `T` tokens of a row, `n` distributions of it (`T` or `T - 1`), `k` entries of each.

ALIGNMENT. Distribution `t` is about token `t + 1`, so it becomes target position `t`: the capture drops vLLM's empty
first entry and keeps the other `T - 1` in order (`process_prompt_logprobs`), and its loss compares distribution `t`
with the student's logits at `t`, unshifted (`lossfuncs/common.py`). A row has `T - 1` distributions, or `T` if
`pack_logits.py` cut the tokens to as many: the last one is then about a token that is not stored, and is dropped.

PACKED ROWS (`attention_mask` 1 1 1 2 2 3 ...) become one row per document, because the teacher scored each document
separately: a distribution is not conditioned on the tokens before its document. Runs of 0 are padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from coldstill.common.progress import tqdm
from coldstill.storage_schema.rows import CachedRow, span_positions, spans_from_mask
from coldstill.tools.errors import NotFullSoftmax, UnusableRow

from .derived_targets import NO_LOGITS, derived_targets
from .distillkit_compression import (
    Compression,
    Legacy,
    Quantized,
    decode_legacy,
    decode_quantized,
    unpack_stream,
    unpack_words,
    value_errors,
    within_mass,
)
from .importing import ImportedRow
from .input_files import InputFile, ParquetTables, check_size, check_token_ids, nested_of, numbers, values_of

LAYOUTS = {
    "quantised": ("compressed_logprobs", "bytepacked_indices"),
    "legacy": ("packed_indices", "exact_values", "coeffs"),
    "plain": ("token_ids", "top_values"),
}
"""The columns of each layout. The names are hashed into `source_sha256`: another spelling is another source."""

MAX_CURVE_MASS = 100.0
"""Largest mass of a position without exact values. A bad curve through log-probs had 4.3 (K = 50, teacher of 0.7 nats);
centered logits are above 1,000. With exact values no limit is needed: they sum to at most 1 if they are log-probs."""

ENTRIES_PER_BLOCK = 1 << 20
"""Unpacking takes up to 130 bytes of each: one for each bit, twice."""


class _Entries(NamedTuple):
    """`ids int64`, and log-probs `float64`, each `[n, k]`: as far as their mass is `possible`, and as decoded with the
    bounds of their `errors`, which are None where the file holds the values themselves."""

    ids: np.ndarray
    possible: np.ndarray
    values: np.ndarray
    errors: np.ndarray | None

    def between(self, start: int, stop: int) -> _Entries:
        """Those of some positions."""
        part, errors = slice(start, stop), self.errors
        return _Entries(
            self.ids[part], self.possible[part], self.values[part], None if errors is None else errors[part]
        )


class DistillKitRows:
    """The documents of a capture as rows. `top_k`: K of the settings, or of the first row if there are none."""

    def __init__(
        self,
        tables: ParquetTables,
        *,
        layout: str,
        compression: Compression | None,
        token_count: int,
        pad_id: int | None,
        progress: bool,
        renormalized: bool = False,
    ):
        self._tables, self._layout, self._compression = tables, layout, compression
        self._token_count, self._pad_id, self._renormalized = token_count, pad_id, renormalized
        self._columns = ("input_ids", "labels", "attention_mask", *LAYOUTS[layout])
        packed = "attention_mask" in tables.names
        self._first_items = _first_items(tables, progress=progress) if packed else None
        self.top_k = min(compression.k if compression else self._first_width(), token_count)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._tables) if self._first_items is None else int(self._first_items[-1])

    def items(self, start: int) -> Iterator[ImportedRow]:
        """Documents from number `start` on."""
        row = start if self._first_items is None else int(np.searchsorted(self._first_items, start, side="right")) - 1
        skipped = 0 if self._first_items is None else start - int(self._first_items[row])
        for file, number, table, index in self._rows(row):
            documents = 1 if self._first_items is None else int(self._first_items[row + 1] - self._first_items[row])
            name = f"{file.stem}-{number}"
            names = [name] if documents == 1 else [f"{name}-{part}" for part in range(documents)]
            try:
                made = self._documents(table, index, names, metadata={"file": file.name, "row": number})
            except NotFullSoftmax as error:
                raise error.at(name) from None
            except UnusableRow as error:
                made = [ImportedRow(one, error.at(name)) for one in names]
            yield from made[skipped:]
            row, skipped = row + 1, 0

    def _rows(self, start: int) -> Iterator[tuple[InputFile, int, pa.RecordBatch, int]]:
        for file, first_row, table in self._tables.batches(start, columns=self._columns):
            table = cast(pa.RecordBatch, table)
            yield from ((file, first_row + index, table, index) for index in range(table.num_rows))

    def _first_width(self) -> int:
        for _, _, table, index in self._rows(0):
            found = nested_of(table, index, "token_ids")
            return int(found[1].max(initial=1)) if found else 1
        return 1

    def _documents(
        self, table: pa.RecordBatch, index: int, names: list[str], *, metadata: dict[str, Any]
    ) -> list[ImportedRow]:
        token_ids = values_of(table, index, "input_ids")
        if token_ids is None:
            raise UnusableRow("input_ids", found="nothing", wanted="token ids")
        entries = self._entries(table, index, tokens=token_ids.size)
        labels = values_of(table, index, "labels")
        mask = values_of(table, index, "attention_mask")
        for name, column in (("labels", labels), ("attention_mask", mask)):
            if column is not None and column.size != token_ids.size:
                raise UnusableRow(name, found=f"{column.size} values", wanted=f"{token_ids.size}, one per token")
        runs = [(0, token_ids.size)] if mask is None else _runs(mask)
        items = []
        for name, (start, stop) in zip(names, runs or [(0, 0)], strict=True):
            loss_mask = None if labels is None else labels[start:stop] != -100
            own = entries.between(start, stop)
            try:
                items.append(self._row(name, token_ids[start:stop], loss_mask, own, metadata))
            except UnusableRow as error:
                items.append(ImportedRow(name, error.at(name)))
        return items

    def _row(
        self,
        name: str,
        token_ids: np.ndarray,
        loss_mask: np.ndarray | None,
        entries: _Entries,
        metadata: dict[str, Any],
    ) -> ImportedRow:
        if self._pad_id is not None and token_ids.size and token_ids[-1] == self._pad_id:
            token_ids, loss_mask = token_ids[:-1], None if loss_mask is None else loss_mask[:-1]
        check_token_ids(token_ids, token_count=self._token_count)
        token_ids = token_ids.astype(np.int32)
        spans = spans_from_mask(np.ones(token_ids.size, bool) if loss_mask is None else loss_mask)
        positions = span_positions(spans)
        if positions.size == 0:
            raise UnusableRow("targets", found=f"none of {token_ids.size} tokens is a target", wanted="at least one")
        targets = derived_targets(
            entries.ids[positions],
            entries.possible[positions],
            present=np.ones((positions.size, entries.ids.shape[1]), bool),
            labels=token_ids[positions + 1],
            token_count=self._token_count,
            top_k=self.top_k,
            renormalized=self._renormalized,
        )
        row = CachedRow(sample_id=name, token_ids=token_ids, target_spans=spans, targets=targets, metadata=metadata)
        errors = None if entries.errors is None else entries.errors[positions]
        return ImportedRow(name, row, entries.values[positions], errors)

    def _entries(self, table: pa.RecordBatch, index: int, *, tokens: int) -> _Entries:
        """The entries of a row at `tokens` positions or one less."""
        config = self._compression
        errors = None
        check_size("distributions", positions=tokens, width=config.k if config else self.top_k)
        if isinstance(config, Quantized) and self._layout == "quantised":
            packed = _matrix(table, index, "compressed_logprobs", config.value_bytes, tokens).astype(np.uint8)
            packed_ids = _matrix(table, index, "bytepacked_indices", config.id_bytes, tokens).astype(np.uint8)
            step = max(1, ENTRIES_PER_BLOCK // config.k)
            parts = [slice(start, start + step) for start in range(0, len(packed), step)]
            values = np.concatenate([decode_quantized(packed[part], config) for part in parts])
            errors = value_errors(values, packed, config)
            ids = np.concatenate([unpack_stream(packed_ids[p], bits=config.id_bits, count=config.k) for p in parts])
        elif isinstance(config, Legacy) and self._layout == "legacy":
            exact = _matrix(table, index, "exact_values", config.exact_k, tokens)
            coefficients = _matrix(table, index, "coeffs", config.coefficients, tokens)
            words = _matrix(table, index, "packed_indices", config.words, tokens).astype(np.uint64)
            values = decode_legacy(exact, coefficients, config)
            errors = value_errors(values, None, config)
            ids = unpack_words(words, bits=config.id_bits, count=config.k)
        else:
            width = self.top_k if config is None else config.k
            values = _matrix(table, index, "top_values", width, tokens).astype(np.float64)
            ids = _matrix(table, index, "token_ids", width, tokens)
        possible = values
        if config is not None and self._layout != "plain":
            possible = _checked_mass(values, exact=config.exact_k)
        if len(ids) != len(values):
            raise UnusableRow(
                "ids and values", found=f"{len(ids)} and {len(values)} positions", wanted="the same number"
            )
        return _Entries(ids.astype(np.int64), possible, values, errors)


def _checked_mass(values: np.ndarray, *, exact: int) -> np.ndarray:
    """`values` by `within_mass`. Raises `NotFullSoftmax` for values that cannot be log-probs."""
    with np.errstate(over="ignore"):
        mass = float(np.nan_to_num(np.exp(values).sum(axis=1)).max(initial=0.0)) if exact == 0 else 0.0
    if mass > MAX_CURVE_MASS:
        raise NotFullSoftmax(
            "the values of a position",
            found=f"probabilities that sum to {mass:.4g}",
            wanted="log-probs of the full softmax",
            fix=NO_LOGITS,
        )
    return within_mass(values, exact=exact)


def _matrix(table: pa.RecordBatch, index: int, name: str, width: int, tokens: int) -> np.ndarray:
    """`[n, width]` numbers of a list-of-lists column. Raises `UnusableRow` if its lengths contradict the settings."""
    found = nested_of(table, index, name)
    if found is None:
        raise UnusableRow(name, found="nothing", wanted="a list per position")
    flat, lengths = found
    if lengths.size not in (tokens, tokens - 1):
        wanted = f"{tokens - 1}, one per predicted token, or {tokens}"
        raise UnusableRow(name, found=f"{lengths.size} positions for {tokens} tokens", wanted=wanted)
    if (lengths != width).any():
        raise UnusableRow(
            name,
            found=f"{int(lengths[(lengths != width).argmax()])} values at a position",
            wanted=f"{width}, from the compression settings",
            fix="check that these are the settings of the capture",
        )
    return numbers(flat, name).reshape(lengths.size, width)


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Start and stop of each run of one nonzero value."""
    edges = np.flatnonzero(np.diff(mask, prepend=mask[:1] - 1, append=mask[-1:] - 1)) if mask.size else np.zeros(1, int)
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges) if mask[a] != 0]


def _first_items(tables: ParquetTables, *, progress: bool) -> np.ndarray:
    """`int64 [rows + 1]`: number of the first document of each row; a row of padding only counts as one document."""
    counts = []
    with tqdm(total=len(tables), desc="documents", unit=" rows", disable=not progress) as bar:
        for _, _, table in tables.batches(0, columns=("attention_mask",)):
            table = cast(pa.RecordBatch, table)
            for index in range(table.num_rows):
                try:
                    mask = values_of(table, index, "attention_mask")
                    counts.append(1 if mask is None else max(len(_runs(mask)), 1))
                except UnusableRow:
                    counts.append(1)
            bar.update(table.num_rows)
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
