"""`coldstill subset`: a new dataset of the rows that a range, a limit and filters select.

A filter is KEY OP VALUE, such as `tokens <= 512`; nothing is evaluated as code.

- KEY: `sample_id`, `tokens`, `targets`, `media` (the number of images), or `metadata.a.b`. A row without that key never
  matches.
- OP: `==`, `!=`, `<`, `<=`, `>`, `>=`, or `~` for a regular expression that is searched for in a text.
- VALUE: JSON, or else plain text. Numbers are compared with numbers, texts with texts.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import InvalidRow, ShardDamaged
from coldstill.tools.errors import InvalidFilter, InvalidRequest

from .deriving import Derivation, Request, derive
from .sources import Sources
from .units import Select, plan_selected, sequence_lengths

MAX_FILTER_LENGTH = 1000
EXAMPLE = 'for instance --filter "tokens <= 512" --filter "metadata.topic == math" --filter "sample_id ~ ^chat-"'

_RANGE = re.compile(r"\s*([0-9]{0,18})\s*:\s*([0-9]{0,18})\s*")
_KEY = re.compile(r"[^\s=!<>~]*")
_OP = re.compile(r"==|!=|<=|>=|<|>|~")
_NUMBERS = ("tokens", "targets", "media")
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ABSENT = object()


def subset(
    root: str | Path,
    output: str | Path,
    *,
    filters: Sequence[str] = (),
    rows: str | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Dataset:
    """Make a dataset at `output` of the rows of the dataset at `root` that match all `filters`.

    `rows`: only rows START:STOP, by number; either end may be left out. `limit`: only the first `limit` of the matching
    rows. Rejects are not copied. Re-run an interrupted subset to resume.

    Raises `InvalidFilter`, `InvalidRequest`, `NothingSelected`, and what `open_dataset` and `derive` raise.
    """
    select = selection([parse_filter(text) for text in filters])
    sources = Sources([open_dataset(root)])
    numbers = parse_rows(rows, count=sources.rows) if rows is not None else range(sources.rows)
    if limit is not None and limit < 1:
        raise InvalidRequest("limit", found=limit, wanted="at least 1")
    header = sources.datasets[0].header.newest()
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
        raise InvalidRequest("rows", found=repr(text), wanted=f"START below STOP, within 0:{count}")
    return range(start, stop)


@dataclass(frozen=True)
class Filter:
    """One condition. `key`: the parts between its dots. `value`: a JSON value; a text for `sample_id` and for `~`."""

    key: tuple[str, ...]
    op: str
    value: Any

    def mask(self, columns: _Columns) -> np.ndarray:
        """`bool [rows]`: which rows match."""
        values = columns.values(self.key)
        if self.op == "~":
            return _found(values, self.value)
        return np.fromiter((self._holds(value) for value in values), bool, count=len(values))

    def _holds(self, found: object) -> bool:
        if found is _ABSENT:
            return False
        if self.op in ("==", "!="):
            # In Python True == 1; in JSON it is not.
            equal = isinstance(found, bool) == isinstance(self.value, bool) and found == self.value
            return equal == (self.op == "==")
        comparable = (_is_number(found) and _is_number(self.value)) or (
            isinstance(found, str) and isinstance(self.value, str)
        )
        return comparable and _ORDER[self.op](found, self.value)


def parse_filter(text: str) -> Filter:
    """Parse a filter. Raises `InvalidFilter` with the position of the first error."""
    if len(text) > MAX_FILTER_LENGTH:
        raise InvalidFilter(
            "a filter", found=f"{len(text)} characters", wanted=f"at most {MAX_FILTER_LENGTH}", fix=EXAMPLE
        )
    start = len(text) - len(text.lstrip())
    name = _KEY.match(text, start)
    assert name is not None
    key = tuple(name[0].split("."))
    is_metadata = key[0] == "metadata" and len(key) > 1 and all(key)
    if not (is_metadata or (len(key) == 1 and key[0] in ("sample_id", *_NUMBERS))):
        raise _invalid(text, start, "sample_id, tokens, targets, media or metadata.KEY")
    place = name.end() + len(text[name.end() :]) - len(text[name.end() :].lstrip())
    op = _OP.match(text, place)
    if op is None:
        raise _invalid(text, place, "== != < <= > >= or ~")
    raw = text[op.end() :].strip()
    place = text.index(raw, op.end()) if raw else len(text)
    if not raw:
        raise _invalid(text, place, "a value")
    value = _json_or_text(raw)
    if key == ("sample_id",) or op[0] == "~":
        value = value if isinstance(value, str) else raw
    if key[0] in _NUMBERS and (op[0] == "~" or not _is_number(value)):
        raise _invalid(text, place if op[0] != "~" else op.start(), f"a comparison of {key[0]} with a number")
    if op[0] in _ORDER and not (_is_number(value) or isinstance(value, str)):
        raise _invalid(text, place, f"a number or a text after {op[0]}")
    if op[0] == "~":
        try:
            _found([""], value)
        except (pa.ArrowException, ValueError) as error:
            raise _invalid(text, place, f"a regular expression (RE2): {error}"[:300]) from None
    return Filter(key, op[0], value)


def selection(filters: Sequence[Filter]) -> Select:
    """A selection of the rows that match all filters. When called, it raises `ShardDamaged`, `InvalidRow`."""

    def select(batch: pa.RecordBatch) -> np.ndarray:
        columns = _Columns(batch)
        mask = np.ones(batch.num_rows, bool)
        for condition in filters:
            mask &= condition.mask(columns)
        return mask

    return select


class _Columns:
    """The values of a row group that filters compare, each read once."""

    def __init__(self, batch: pa.RecordBatch):
        self._batch = batch

    def values(self, key: tuple[str, ...]) -> Sequence[Any]:
        if key == ("sample_id",):
            return self._texts("sample_id")
        if key[0] in _NUMBERS:
            return self._lengths[_NUMBERS.index(key[0])]
        return [_inside(document, key[1:]) for document in self._metadata]

    @cached_property
    def _lengths(self) -> tuple[list[int], ...]:
        tokens, targets = sequence_lengths(self._batch)
        return tokens.tolist(), targets.tolist(), pc.list_value_length(self._batch.column("media")).to_pylist()

    @cached_property
    def _metadata(self) -> list[Any]:
        documents = []
        for row, text in enumerate(self._texts("metadata")):
            try:
                documents.append(json.loads(text))
            except (ValueError, RecursionError) as error:
                found = f"{type(error).__name__}: {error}"[:200]
                raise ShardDamaged(f"metadata of row {row} of a row group", found=found, wanted="JSON") from None
        return documents

    def _texts(self, name: str) -> list[str]:
        try:
            return list(self._batch.column(name).to_pylist())
        except UnicodeDecodeError as error:
            raise InvalidRow(name, found=str(error)[:200], wanted="UTF-8") from None


def _inside(document: object, key: tuple[str, ...]) -> object:
    for name in key:
        if not isinstance(document, dict) or name not in document:
            return _ABSENT
        document = document[name]
    return document


def _found(values: Sequence[object], pattern: str) -> np.ndarray:
    """Which values are texts that contain the pattern. RE2 takes linear time in the text for every pattern."""
    # JSON may hold lone surrogates, which UTF-8 cannot encode.
    texts = [value.encode(errors="replace").decode() if isinstance(value, str) else None for value in values]
    found = pc.match_substring_regex(pa.array(texts, pa.string()), pattern=pattern)
    return np.asarray(found.fill_null(False).to_numpy(zero_copy_only=False), bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _json_or_text(raw: str) -> Any:
    try:
        return json.loads(raw, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        return raw


def _reject_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _invalid(text: str, place: int, wanted: str) -> InvalidFilter:
    return InvalidFilter(
        f"filter {text!r}, character {place + 1}", found=repr(text[place : place + 40]), wanted=wanted, fix=EXAMPLE
    )
