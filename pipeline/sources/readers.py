"""A source by its settings: a plan of units once, then the rows of any one unit.

Source order and unit borders depend on the source and `rows_per_unit` alone. A unit's rows are read by its worker from
where they stand, so that no row passes through the driver and none is read that is not the unit's own.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from coldstill.pipeline.config import SourceConfig
from coldstill.pipeline.errors import SourceChanged, SourceEmpty, TooManyUnits
from coldstill.storage_schema.plan import MAX_UNITS, Plan, Unit
from coldstill.storage_schema.store import Store

from .files import find_files, sample_sha256
from .kinds import kind_of, origin_of, reader_of
from .rows import Reader, SourceFile, SourceRow, Survey
from .staging import SourceIndex, StagedRows, read_index, stage, write_index
from .streams import HubDataset, SequentialRows, Stream

__all__ = ["Source", "SourceRow", "open_source"]

_ONE_UNIT = 1 << 62
_SETTINGS = ("dataset_config", "split", "messages", "tools", "prompt", "response", "text", "id")
"""What is read, and is in no digest."""


class Source:
    """The rows that the settings name, with what `store` holds of them: see `staging.py`. Without a store nothing is
    written, and a source that cannot be sought is read from its start."""

    def __init__(self, config: SourceConfig, store: Store | None = None):
        self._config, self._store = config, store
        self.name = config.path or f"dataset {config.dataset}"
        self._index = read_index(store) if store is not None else None
        if self._index is None:
            _ = self._origin  # what is missing is named at once

    @property
    def is_surveyed(self) -> bool:
        """Whether workers can read units: the store holds what the pass over the source gave."""
        return self._index is not None

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the content. On later starts names, sizes, stamps and some blocks are compared with the index, and
        only where they differ is everything read again.

        Raises `SourceChanged` where another split or other columns are asked for than at the first start.
        """
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
        """Units of `rows_per_unit` rows each, the last with what is left: one pass over the source, which is staged on
        the way where it cannot be sought.

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
        self.fingerprint = survey.sha256
        return _plan(self.name, survey, rows_per_unit)

    def rows(self) -> Iterator[SourceRow]:
        """All rows, from the first on; needs no plan."""
        if self._store is not None and self._index is not None and self._index.parts:
            return StagedRows(self._store, self._index).rows()
        return self._origin.rows()

    def head(self, count: int = 1) -> list[SourceRow]:
        """The first rows, before there is a plan. Raises `SourceEmpty`."""
        rows = list(itertools.islice(self.rows(), count))
        if not rows:
            raise _empty(self.name)
        return rows

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        """The rows of one unit of the plan. Raises `SourceChanged` where they are no longer there."""
        return self._reader.read(unit)

    @cached_property
    def _files(self) -> tuple[SourceFile, ...]:
        """The source's files, as they are now."""
        path = self._config.path
        return tuple(find_files(path)) if path is not None else self._origin.files

    @cached_property
    def _origin(self) -> Reader | Stream:
        """The source itself, as it is now."""
        path = self._config.path
        if path is None:
            return HubDataset(self._config)
        if not glob.has_magic(path):
            kind_of(path)  # a wrong ending is named before a wrong name
        return origin_of(self._files)

    @cached_property
    def _reader(self) -> Reader | SequentialRows:
        """What reads the rows of a unit: the staged copy, the files of the plan, or the source from its start."""
        index = self._index
        if index is not None and index.parts and self._store is not None:
            return StagedRows(self._store, index)
        if index is not None and (self._store is not None or isinstance(self._origin, Reader)):
            return reader_of(index.files)
        origin = self._origin
        return SequentialRows(self.name, origin.rows) if isinstance(origin, Stream) else origin

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
        """Remember a survey, in the store too where there is one."""
        self._index = SourceIndex(
            sha256=survey.sha256,
            sample_sha256=sample_sha256(survey.files),
            rows=survey.rows,
            files=survey.files,
            parts=parts,
            settings={name: getattr(self._config, name) for name in _SETTINGS},
        )
        if self._store is not None:
            write_index(self._store, self._index)
        self.__dict__.pop("_reader", None)


def open_source(config: SourceConfig, store: Store | None = None) -> Source:
    """The source that the settings name. Nothing is read of it before it is needed; what is missing or damaged is
    named then."""
    return Source(config, store)


def _differs(now: SourceFile, then: SourceFile) -> bool:
    """Whether a file is another than it was; a stamp that is not known, for want of an answer, is no difference."""
    return now.name != then.name or now.bytes != then.bytes or bool(now.stamp and now.stamp != then.stamp)


def _require_settings(config: SourceConfig, index: SourceIndex) -> None:
    for name, value in index.settings.items():
        if getattr(config, name) != value:
            raise SourceChanged(
                f"source.{name}",
                found=getattr(config, name),
                wanted=f"{value}, as when the dataset was begun",
                fix="put it back, or choose another output",
            )


def _plan(name: str, survey: Survey, rows_per_unit: int) -> Plan:
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
