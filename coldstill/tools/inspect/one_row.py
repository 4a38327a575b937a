"""One row of a dataset for people to look at: a path and a number in, the checked row and its dataset out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.inspect.row_facts import RowFacts, row_facts
from coldstill.tools.inspect.token_text import TokenText


class RowOutOfRange(ColdstillError):
    """There is no row of this number in the dataset."""


@dataclass(frozen=True, kw_only=True)
class OneRow:
    """Row number `index` of `dataset` with its numbers and the text of its tokens."""

    dataset: Dataset
    index: int
    row: CachedRow
    facts: RowFacts
    text: TokenText


def open_row(root: str | Path, index: int) -> OneRow:
    """Row `index` of the dataset at `root`. Raises `RowOutOfRange`, `TokenizerUnreadable`, and what `open_dataset` and
    `Dataset.row` raise."""
    dataset = open_dataset(root)
    if not 0 <= index < len(dataset):
        wanted = f"a number from 0 to {len(dataset) - 1}" if len(dataset) else "nothing: the dataset has no rows"
        raise RowOutOfRange(f"{dataset.store.url}: row number", found=index, wanted=wanted)
    row = dataset.row(index)
    row.check(token_count=dataset.header.token_count)
    return OneRow(dataset=dataset, index=index, row=row, facts=row_facts(row), text=TokenText(dataset))
