"""The rows of axolotl's KD layout: its columns in, one aligned `CachedRow` per row out.

ALIGNMENT is not in the file and has changed. Until June 2025 its trainer compared the student at `p` with row `p + 1`
(`target_logprobs[..., 1:, :]`), so row `p` was about token `p` itself: `predicts="same"`. Since commit ccc94da the loss
compares row `p` with the student at `p` and shifts only the labels (`kernels/liger.py`), so row `p` must be about token
`p + 1`: `predicts="next"`; its vLLM client was changed to match ("shift off the first empty token"), its offline
preprocessing and its sglang client were not. So prepared columns are taken as `next`, raw lists as `same`, and
`plausible.py` refuses the import where the first rows say otherwise. The row about token `t + 1` is our target `t`; a
row about token 0, or about a token past the end, is left out.

A token is a target where `labels` says so (not -100), and where there are no labels, where `target_mask` is set, and
where there is neither, where its list has entries. A learned token without a distribution is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa

from coldstill.storage_schema.rows import CachedRow, span_positions, spans_from_mask

from .axolotl_columns import entries_of, metadata_of
from .cells import nested_of, text_of, values_of
from .derive import ABSENT_LOGPROB, derived_targets
from .errors import NotFullSoftmax, SourceUnreadable, UnusableRow, placed
from .files import Tables
from .importing import Item

Predicts = Literal["next", "same"]


class AxolotlRows:
    """The rows of a file, aligned. `top_k`: as given, or as many entries as the first row has at a position."""

    def __init__(
        self,
        tables: Tables,
        *,
        prepared: bool,
        predicts: Predicts,
        logprobs_field: str,
        token_count: int,
        top_k: int | None,
    ):
        self._tables, self._prepared, self._logprobs = tables, prepared, logprobs_field
        self.predicts, self.token_count = predicts, token_count
        self.top_k = min(top_k or self._first_width(), token_count)

    def __len__(self) -> int:
        """Rows of all files."""
        return len(self._tables)

    def items(self, start: int) -> Iterator[Item]:
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
                yield Item(f"{file.stem}-{first_row}", table)
                continue
            for index in range(table.num_rows):
                name = text_of(table, index, "sample_id") or text_of(table, index, "id")
                name = name or f"{file.stem}-{first_row + index}"
                try:
                    yield Item(name, self._row(table, index, name))
                except NotFullSoftmax as error:
                    raise placed(error, f"{file.name}, row {first_row + index}") from None
                except UnusableRow as error:
                    yield Item(name, placed(error, f"{file.name}, row {first_row + index}"))

    @property
    def _values(self) -> str:
        return "target_logprobs" if self._prepared else self._logprobs

    def _first_width(self) -> int:
        for _, _, table in self._tables.batches(0, columns=(self._values,)):
            found = None if isinstance(table, UnusableRow) else nested_of(table, 0, self._values)
            if found is not None and found[1].size:
                return max(int(found[1].max()), 1)
        raise SourceUnreadable(self._values, found="no row with entries", wanted="lists of log-probs per position")

    def _row(self, table: pa.RecordBatch, index: int, name: str) -> CachedRow:
        token_ids = values_of(table, index, "input_ids")
        if token_ids is None or token_ids.size < 2:
            raise UnusableRow("input_ids", found="nothing" if token_ids is None else "one token", wanted="two or more")
        if token_ids.min() < 0 or token_ids.max() >= self.token_count:
            wanted = f"0..{self.token_count - 1}"
            raise UnusableRow("input_ids", found=f"{token_ids.min()}..{token_ids.max()}", wanted=wanted)
        labels = values_of(table, index, "labels")
        if labels is not None and labels.size != token_ids.size:
            raise UnusableRow("labels", found=f"{labels.size} values", wanted=f"{token_ids.size}, one per token")
        entries = entries_of(table, index, self._values)
        about = self._first_token(len(entries.ids), token_ids.size) + np.arange(len(entries.ids))
        has_entry = (entries.present & ~(entries.logprobs <= ABSENT_LOGPROB)).any(axis=1)
        usable = has_entry & (about >= 1) & (about < token_ids.size)
        if labels is None:
            learned = np.zeros(token_ids.size, bool)
            learned[about[usable & ~entries.masked]] = True
        else:
            learned = labels != -100
        spans = spans_from_mask(learned)
        positions = span_positions(spans)
        if positions.size == 0:
            raise UnusableRow("targets", found="no learned token with a distribution", wanted="at least one")
        place = np.full(token_ids.size, -1)
        place[about[usable]] = np.flatnonzero(usable)
        chosen = place[positions + 1]
        if (chosen < 0).any():
            raise UnusableRow(
                f"token {int(positions[(chosen < 0).argmax()]) + 1}",
                found=f"no distribution, as for {int((chosen < 0).sum())} of {chosen.size} learned tokens",
                wanted="one for each token that is learned",
                fix="mask these tokens in `labels`, or check which token a row is about (`predicts`)",
            )
        token_ids = token_ids.astype(np.int32)
        targets = derived_targets(
            entries.ids[chosen],
            entries.logprobs[chosen],
            present=entries.present[chosen],
            labels=token_ids[positions + 1],
            token_count=self.token_count,
            top_k=self.top_k,
        )
        return CachedRow(
            sample_id=name,
            token_ids=token_ids,
            target_spans=spans,
            targets=targets,
            metadata=metadata_of(text_of(table, index, "metadata")),
        )

    def _first_token(self, count: int, tokens: int) -> int:
        """The token that the first of `count` lists is about."""
        shift = 1 if self.predicts == "next" else 0
        if self._prepared and count not in (tokens, tokens - shift):
            raise UnusableRow("target_logprobs", found=f"{count} lists", wanted=f"{tokens}, one per token")
        if count > tokens:
            raise UnusableRow(self._values, found=f"{count} lists", wanted=f"at most {tokens}, one per token")
        return shift if self._prepared else tokens - count + shift
