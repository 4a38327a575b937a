"""`coldstill subset`: a sealed dataset in, a dataset of those rows out that a range and filters take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from coldstill.storage_schema.dataset import Dataset, open_dataset

from .deriving import Derivation, derive
from .errors import InvalidRequest
from .filters import parse_filter, selection
from .output import Request
from .selecting import plan_selected
from .sources import Sources

_RANGE = re.compile(r"\s*([0-9]{0,18})\s*:\s*([0-9]{0,18})\s*")


def subset(
    root: str | Path,
    output: str | Path,
    *,
    filters: Sequence[str] = (),
    rows: str | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Dataset:
    """The dataset at `output` with the rows of the dataset at `root` for which all `filters` hold.

    `filters`: see `filters.py`. `rows`: only rows START:STOP, by number, either end may be left out. `limit`: at most
    so many rows, the first ones. Rejects are not carried. Started again after a kill, it goes on.

    Raises `InvalidFilter`, `InvalidRequest`, `NothingSelected`, and as `open_dataset` and `derive`.
    """
    select = selection([parse_filter(text) for text in filters])
    sources = Sources([open_dataset(root)])
    numbers = parse_rows(rows, count=sources.rows) if rows is not None else range(sources.rows)
    if limit is not None and limit < 1:
        raise InvalidRequest("limit", found=limit, wanted="at least 1")
    header = sources.datasets[0].header
    derivation = Derivation(
        request=Request(
            command="subset",
            sources=sources.ids,
            options={
                "filters": [text.strip() for text in filters],
                "rows": [numbers.start, numbers.stop],
                "limit": limit,
            },
        ),
        sources=sources,
        header=header,
        select=select,
        make_plan=lambda: plan_selected(
            sources, [select], rows=numbers, limit=limit, rows_per_unit=header.rows_per_unit, progress=progress
        )[0],
    )
    return derive(output, derivation, progress=progress)


def parse_rows(text: str, *, count: int) -> range:
    """The row numbers of START:STOP of a dataset with `count` rows. Raises `InvalidRequest`."""
    found = _RANGE.fullmatch(text)
    if found is None:
        raise InvalidRequest("rows", found=repr(text)[:100], wanted="START:STOP", fix='for instance --rows "0:1000"')
    start, stop = int(found[1] or 0), min(int(found[2] or count), count)
    if start >= stop:
        raise InvalidRequest("rows", found=repr(text), wanted=f"START below STOP, in 0:{count}")
    return range(start, stop)
