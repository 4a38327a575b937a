"""Open one row for inspection, and compute entropy, surprise, rank and tail mass of each target.

Shape letters: `N` target positions, `K` teacher top-k. All logs are natural, all entropies in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coldstill.common.visible import json_start, visible
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.errors import RowOutOfRange

from .token_text import MAX_SHOWN, TokenText, shortened

MAX_METADATA = 20_000
"""Maximum number of characters shown of the metadata."""


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """The teacher's values at each target position of a row.

    `entropy float64 [N]`: of the kept entries and ONE bucket for the rest, `-sum p ln p - tail ln tail`. It is a lower
    bound of the teacher's entropy, because the distribution within the tail is not stored. `tail_mass float64 [N]`:
    probability outside the kept entries. `surprise float64 [N]`: `-ln p` of the label, the token that follows in the
    text. `label_rank int32 [N]`: rank of the label among the kept entries, from 1; 0 if it is not kept.
    `ids int32 [N, K]`, `probs float64 [N, K]`: the kept entries, most probable first, equal ones by id; unused entries
    come last with id -1 and probability 0. `counts int32 [N]`: entries in use.
    """

    positions: np.ndarray
    labels: np.ndarray
    entropy: np.ndarray
    tail_mass: np.ndarray
    surprise: np.ndarray
    label_rank: np.ndarray
    ids: np.ndarray
    probs: np.ndarray
    counts: np.ndarray

    @property
    def label_probs(self) -> np.ndarray:
        """`float64 [N]`: probability of the label."""
        return np.exp(-self.surprise)


@dataclass(frozen=True, kw_only=True)
class InspectedRow:
    """Row number `index` of `dataset`, with its facts and the text of its tokens."""

    dataset: Dataset
    index: int
    row: CachedRow
    facts: RowFacts
    text: TokenText

    @property
    def shown_id(self) -> str:
        """The sample id, safe to show: its start, since a stranger's can have a megabyte."""
        return shortened(visible(self.row.sample_id[:MAX_SHOWN]), MAX_SHOWN)

    def metadata_start(self, *, indent: int | None = None) -> str:
        """The first `MAX_METADATA` characters of the metadata as JSON, safe to show; empty if there is none."""
        return json_start(dict(self.row.metadata), MAX_METADATA, indent=indent) if self.row.metadata else ""


def open_row(root: str | Path, index: int) -> InspectedRow:
    """Open and check row `index` of the dataset at `root`.

    Raises `RowOutOfRange`, `PackagesMissing`, `TokenizerUnreadable`, and what `open_dataset` and `Dataset.row` raise.
    """
    dataset = open_dataset(root)
    if not 0 <= index < len(dataset):
        wanted = f"a number from 0 to {len(dataset) - 1}" if len(dataset) else "nothing: the dataset has no rows"
        raise RowOutOfRange(f"{dataset.store.url}: row number", found=index, wanted=wanted)
    row = dataset.row(index)
    dataset.check_row(row)
    return InspectedRow(dataset=dataset, index=index, row=row, facts=row_facts(row), text=TokenText(dataset))


def row_facts(row: CachedRow) -> RowFacts:
    """Compute the facts of a row; its targets may list the kept entries in any order."""
    targets, labels = row.targets, row.labels
    ids = np.where(targets.kept, targets.ids, -1)
    logprobs = np.where(targets.kept, targets.logprobs.astype(np.float64), -np.inf)
    order = np.lexsort((ids, -logprobs), axis=1)
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    probs, log_tail = np.exp(logprobs), targets.log_tail.astype(np.float64)
    weighted = probs * np.where(np.isfinite(logprobs), logprobs, 0.0)
    is_label = ids == labels[:, None]
    return RowFacts(
        positions=row.positions,
        labels=labels,
        entropy=np.maximum(-weighted.sum(1) - np.exp(log_tail) * log_tail, 0.0),
        tail_mass=np.exp(log_tail),
        surprise=np.maximum(-targets.label_logprob.astype(np.float64), 0.0),
        label_rank=np.where(is_label.any(1), is_label.argmax(1) + 1, 0).astype(np.int32),
        ids=ids.astype(np.int32),
        probs=probs,
        counts=targets.counts.astype(np.int32),
    )
