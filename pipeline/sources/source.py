"""A source: its format, its plan of work units, and the rows of any unit.

Row order and unit borders depend on the source and on `rows_per_unit` only. Each worker reads the rows of its unit from
where they are, so that no row passes through the driver.

To add a format, write a `Reader` (random access) or a `Stream` (from the start only; `staging.py` copies it), see
`files.py`, and name its file endings in `format_of`, `_origin_of` and `_reader_of`.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from coldstill.common.errors import type_and_line
from coldstill.common.models import FrozenModel, parse_document
from coldstill.common.plugins import load_plugin
from coldstill.pipeline.errors import (
    SourceAdapterFailed,
    SourceChanged,
    SourceEmpty,
    SourceNotFound,
    SourceUnreadable,
    TooManyUnits,
)
from coldstill.pipeline.source_config import SourceConfig
from coldstill.storage_schema.plan import MAX_UNITS, Plan, Unit
from coldstill.storage_schema.store import Store

from .dataset_rows import DatasetRows
from .files import Reader, SourceFile, SourceRow, Stream, Survey, as_text, changed, find_files, is_folder, sample_sha256
from .hub_dataset import HubDataset
from .json_lines import COMPRESSIONS, CompressedLines, JsonDocuments, JsonLines, is_document
from .parquet_rows import ParquetRows, WideParquet
from .staging import STAGING_FOLDER, StagedRows, stage

_ONE_UNIT = 1 << 62
_INDEX_NAME = f"{STAGING_FOLDER}/source.json"
_SETTINGS = ("dataset_config", "split", "messages", "tools", "prompt", "response", "text", "id")
"""Settings that select what is read and are not part of a digest."""
_LINES = ("jsonl", "json", "ndjson")
_WHOLE = tuple(f".json{ending}" for ending in ("", *COMPRESSIONS))
"""Endings of files that may be one JSON document instead of lines."""


class SourceIndex(FrozenModel):
    """`staging/source.json`: the source as it was when its plan was made. A resumed capture is compared with it."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Digest of the whole content.")
    sample_sha256: str = Field(description="Digest of some blocks: see `sample_sha256` in files.py.")
    rows: int
    files: tuple[SourceFile, ...]
    parts: tuple[SourceFile, ...] = Field(default=(), description="The staged copy, if there is one.")
    settings: dict[str, Any] = Field(description="Settings that select what is read; `adapter` only if it is set.")


class Source:
    """The rows that the settings describe, and the index and staged copy of them in `store`.

    Without a store nothing is written, and a source without random access is read from its start.
    """

    def __init__(self, config: SourceConfig, store: Store | None = None):
        self._config, self._store = config, store
        self.name = config.path or config.rows_of or f"dataset {config.dataset}"
        self._adapt = _loaded_adapter(config.adapter) if config.adapter else None
        self._index = read_index(store) if store is not None else None
        if self._index is None:
            _ = self._origin  # raises the errors of a missing source before anything else starts
        else:
            _require_settings(config, self._index)

    @property
    def is_surveyed(self) -> bool:
        """Whether workers can read units: the store holds the index."""
        return self._index is not None

    @property
    def fingerprint(self) -> str:
        """Digest of the content, and of the adapter's name if there is one.

        Raises `SourceChanged` if settings that select what is read differ from those of the first start.
        """
        content = self._content_sha256
        if self._config.adapter is None:
            return content
        return hashlib.sha256(f"{content}\nadapter {self._config.adapter}\n".encode()).hexdigest()

    @cached_property
    def _content_sha256(self) -> str:
        """Digest of the content. Reads it all only if names, sizes, stamps or sample blocks differ from the index."""
        index = self._index
        if index is None:
            return self._survey(_ONE_UNIT).sha256
        _require_settings(self._config, index)
        if not self._has_changed(index):
            return index.sha256
        survey = self._survey(_ONE_UNIT)
        if survey.sha256 == index.sha256:  # moved, or touched: workers need the new names
            self._keep(survey, parts=index.parts)
        return survey.sha256

    def plan(self, rows_per_unit: int) -> Plan:
        """Units of `rows_per_unit` rows each; the last one may be shorter.

        Takes one pass over the source, which stages it if it has no random access.
        Raises `SourceEmpty`, `TooManyUnits`, `SourceUnreadable`.
        """
        index = self._index
        if index is not None and index.parts and not self._has_changed(index):
            _require_settings(self._config, index)
            survey = Survey(index.sha256, index.rows, None, index.files)
        elif self._store is not None and isinstance(self._origin, Stream):
            parts = stage(self._store, self._origin)
            survey = self._origin.survey(sum(part.rows for part in parts))
            self._keep(survey, parts=parts)
        else:
            survey = self._survey(rows_per_unit)
            self._keep(survey)
        self._content_sha256 = survey.sha256
        return _plan(self.name, survey, rows_per_unit)

    def rows(self, *, only: str | None = None) -> Iterator[SourceRow]:
        """All rows in order; needs no plan. `only`: the one column that the caller needs, if reading it alone is
        cheaper. Raises `SourceAdapterFailed`."""
        if only is not None and self._adapt is None and isinstance(self._origin, ParquetRows):
            return self._origin.rows(only)
        if self._store is not None and self._index is not None and self._index.parts:
            return self._adapted(StagedRows(self._store, self._index.parts).rows())
        return self._adapted(self._origin.rows())

    def head(self, count: int = 1) -> list[SourceRow]:
        """The first rows; needs no plan. Raises `SourceEmpty`, `SourceAdapterFailed`."""
        rows = list(itertools.islice(self.rows(), count))
        if not rows:
            raise _empty(self.name)
        return rows

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        """The rows of one unit of the plan.

        Raises `SourceChanged` if they are no longer there, and `SourceAdapterFailed`.
        """
        return self._adapted(self._reader.read(unit))

    def _adapted(self, rows: Iterable[SourceRow]) -> Iterator[SourceRow]:
        """The rows after the user's adapter, if there is one; the only place where it is called."""
        return iter(rows) if self._adapt is None else map(self._adapt, rows)

    @cached_property
    def _files(self) -> tuple[SourceFile, ...]:
        """The source's files as they are now."""
        path = self._config.path
        return tuple(_files_at(path)) if path is not None else self._origin.files

    @cached_property
    def _origin(self) -> Reader | Stream:
        """The source as it is now."""
        path = self._config.path
        if self._config.rows_of is not None:
            return DatasetRows(self._config.rows_of)
        if path is None:
            return HubDataset(self._config)
        has_ending = "." in path.rpartition("/")[2]
        if has_ending and not glob.has_magic(path) and not _has_known_ending(path) and not is_folder(path):
            format_of(path)  # a wrong ending is reported before a missing file
        return _origin_of(self._files)

    @cached_property
    def _reader(self) -> Reader | _SequentialRows:
        """Reads the rows of a unit: from the staged copy, from the files of the index, or from the source's start."""
        index = self._index
        if index is not None and index.parts and self._store is not None:
            return StagedRows(self._store, index.parts)
        if self._config.rows_of is not None and isinstance(self._origin, DatasetRows):
            return self._origin
        if index is not None and (self._store is not None or isinstance(self._origin, Reader)):
            return _reader_of(index.files)
        origin = self._origin
        return _SequentialRows(self.name, origin.rows) if isinstance(origin, Stream) else origin

    def _survey(self, rows_per_unit: int) -> Survey:
        origin = self._origin
        if isinstance(origin, Stream):
            return origin.survey(sum(1 for _ in origin.documents()))
        return origin.survey(rows_per_unit)

    def _has_changed(self, index: SourceIndex) -> bool:
        files = self._files
        return (
            len(files) != len(index.files)
            or any(map(_differs, files, index.files))
            or sample_sha256(files) != index.sample_sha256
        )

    def _keep(self, survey: Survey, parts: tuple[SourceFile, ...] = ()) -> None:
        """Store a survey as the index."""
        adapter = {"adapter": self._config.adapter} if self._config.adapter else {}
        self._index = SourceIndex(
            sha256=survey.sha256,
            sample_sha256=sample_sha256(survey.files),
            rows=survey.rows,
            files=survey.files,
            parts=parts,
            settings={name: getattr(self._config, name) for name in _SETTINGS} | adapter,
        )
        if self._store is not None:
            self._store.put(_INDEX_NAME, self._index.model_dump_json(indent=1).encode())
        self.__dict__.pop("_reader", None)


class _SequentialRows:
    """Units of a stream without a staged copy. Read in order they take one pass over it, otherwise one pass each."""

    def __init__(self, name: str, rows: Callable[[], Iterator[SourceRow]]):
        self._name, self._rows = name, rows
        self._following = rows()
        self._next = 0

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        if unit.first_row < self._next:
            self._following, self._next = self._rows(), 0
        for row in self._following:
            self._next = row.number + 1
            if row.number >= unit.first_row:
                yield row
            if self._next == unit.first_row + unit.rows:
                return
        found, wanted = f"{self._next} rows in all", f"row {unit.first_row + unit.rows - 1}"
        raise changed(self._name, unit=unit, found=found, wanted=wanted)


def open_source(config: SourceConfig, store: Store | None = None) -> Source:
    """The source that the settings describe.

    Raises `SourceNotFound`, `SourceUnreadable` and `PluginNotFound` for problems that can be found without reading
    rows.
    """
    return Source(config, store)


def read_index(store: Store) -> SourceIndex | None:
    """The index; None if there is none, or if it is damaged: then the source is surveyed again."""
    with suppress(FileNotFoundError, SourceUnreadable):
        return parse_document(store.read(_INDEX_NAME), model=SourceIndex, where=_INDEX_NAME, error=SourceUnreadable)
    return None


def format_of(name: str) -> str:
    """`lines`, `compressed` or `parquet`, by the ending of a file name. Raises `SourceUnreadable`."""
    stem, _, ending = name.lower().rpartition(".")
    compression = f".{ending}" in COMPRESSIONS
    ending = stem.rpartition(".")[2] if compression else ending
    if ending in _LINES:
        return "compressed" if compression else "lines"
    if ending == "parquet" and not compression:
        return "parquet"
    raise SourceUnreadable(
        name,
        found="an unknown ending",
        wanted=".jsonl or .json, also with .gz or .zst, or .parquet",
        fix="convert it to JSON Lines or Parquet; datasets can write both: `to_json`, `to_parquet`",
    )


def _has_known_ending(name: str) -> bool:
    try:
        return bool(format_of(name))
    except SourceUnreadable:
        return False


def _files_at(path: str) -> list[SourceFile]:
    """The files at a path or pattern; those of a folder whose endings are known. Raises `SourceNotFound`."""
    if glob.has_magic(path) or _has_known_ending(path) or not is_folder(path):
        return find_files(path)
    try:
        found = [file for file in find_files(f"{path.rstrip('/')}/*") if _has_known_ending(file.name)]
    except SourceNotFound:
        found = []
    # A folder of data often holds a .json of another kind, such as dataset_infos.json.
    rows = [file for file in found if not file.name.lower().endswith(_WHOLE)] or found
    if not rows:
        raise SourceNotFound(
            path,
            found="a folder without .jsonl, .json or .parquet files",
            wanted="a folder with such files",
            fix=f"name the files by a pattern, such as {path.rstrip('/')}/**/*.parquet",
        )
    return rows


def _origin_of(files: Sequence[SourceFile]) -> Reader | Stream:
    """Reads these files as they are. Raises `SourceUnreadable`."""
    formats = {format_of(file.name): file.name for file in files}
    if "parquet" in formats and len(formats) > 1:
        found, wanted = "JSON Lines and Parquet in one source", "files of one format"
        raise SourceUnreadable(", ".join(formats.values()), found=found, wanted=wanted, fix="narrow source.path")
    # A store that does not report the size of a file cannot seek in it.
    if any(file.name.lower().endswith(_WHOLE) for file in files) and is_document(files[0]):
        return JsonDocuments(files)
    if "compressed" in formats or ("lines" in formats and any(file.bytes is None for file in files)):
        return CompressedLines(files)
    reader = _reader_of(files)
    return WideParquet(files) if isinstance(reader, ParquetRows) and reader.is_wide() else reader


def _reader_of(files: Sequence[SourceFile]) -> Reader:
    """Reads units of these files, which are known to have random access."""
    return ParquetRows(files) if format_of(files[0].name) == "parquet" else JsonLines(files)


def _loaded_adapter(name: str) -> Callable[[SourceRow], SourceRow]:
    """The user's function `module:name`, applied to a row. Raises `PluginNotFound`.

    A row whose text is not a JSON object is passed through; it is rejected later.
    """
    function = load_plugin(name, key="source.adapter")

    def adapt(row: SourceRow) -> SourceRow:
        if row.columns is None:
            return row
        try:
            columns = function(row.columns)
            if columns is None or columns == {}:
                return row._replace(is_dropped=True)
            if isinstance(columns, dict):
                return as_text(row._replace(columns=columns))  # raises what JSON cannot hold
        except Exception as error:
            raise _adapter_failed(name, row, type_and_line(error)) from error
        raise _adapter_failed(name, row, f"returned {type(columns).__name__}")

    return adapt


def _adapter_failed(name: str, row: SourceRow, found: str) -> SourceAdapterFailed:
    return SourceAdapterFailed(
        f"source.adapter {name}: row {row.number}",
        found=found,
        wanted="a dict with the columns that the settings name, or None to reject the row",
        fix="correct the function and re-run the same command to resume: committed units are kept",
    )


def _differs(now: SourceFile, then: SourceFile) -> bool:
    """Whether a file has changed. Stamps are compared only if the store reports one now."""
    return now.name != then.name or now.bytes != then.bytes or bool(now.stamp and now.stamp != then.stamp)


def _require_settings(config: SourceConfig, index: SourceIndex) -> None:
    for name, value in ({"adapter": None} | index.settings).items():
        if getattr(config, name) != value:
            raise SourceChanged(
                f"source.{name}",
                found=getattr(config, name),
                wanted=f"{value}, as when the capture was started",
                fix="restore the setting, or choose another output",
            )


def _plan(name: str, survey: Survey, rows_per_unit: int) -> Plan:
    if survey.unit_rows is not None:
        first = np.cumsum(survey.unit_rows) - survey.unit_rows
        return Plan(start=first, first_row=first, rows=survey.unit_rows)
    units = -(-survey.rows // rows_per_unit)
    if not units:
        raise _empty(name)
    if units > MAX_UNITS:
        raise TooManyUnits(
            name,
            found=f"{survey.rows:,} rows in {units:,} units of {rows_per_unit}",
            wanted=f"at most {MAX_UNITS:,} units",
            fix=f"set rows_per_unit to {-(-survey.rows // MAX_UNITS)} or more",
        )
    first = np.arange(units, dtype=np.int64) * rows_per_unit
    rows = np.minimum(rows_per_unit, survey.rows - first)
    return Plan(start=first if survey.starts is None else survey.starts, first_row=first, rows=rows)


def _empty(name: str) -> SourceEmpty:
    return SourceEmpty(name, found="no rows", wanted="at least one row", fix="check source.path")
