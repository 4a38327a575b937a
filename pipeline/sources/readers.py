"""Rows of a source by unit. A path in; a plan of units once, then the rows of any one unit.

Source order and unit borders depend on the file alone. A unit's rows are read by its worker from where they stand,
so that no row passes through the driver and none is read that is not the unit's own.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.errors import SourceChanged, SourceEmpty, SourceNotFound, SourceUnreadable
from storage_schema.plan import Unit

_BLOCK = 8 << 20


class SourceRow(NamedTuple):
    """Row number `number` of the source: its columns, or what is wrong with it."""

    number: int
    columns: dict[str, Any] | None
    problem: str = ""


class Source(ABC):
    """A file of rows."""

    def __init__(self, path: str):
        self.path = path

    @abstractmethod
    def plan(self, rows_per_unit: int) -> list[Unit]:
        """Units of `rows_per_unit` rows each, the last with what is left."""

    @abstractmethod
    def read(self, unit: Unit) -> Iterator[SourceRow]:
        """The rows of one unit. Raises `SourceChanged` where they are no longer there."""

    def sha256(self) -> str:
        """Digest of the file's content."""
        digest = hashlib.sha256()
        with fsspec.open(self.path, "rb") as file, _byte_bar(file, "source digest") as bar:
            while block := file.read(_BLOCK):
                digest.update(block)
                bar.update(len(block))
        return digest.hexdigest()

    def first(self) -> SourceRow:
        """The first row, before there is a plan."""
        return next(self.read(Unit(0, 0, 0, 1)))

    def _changed(self, unit: Unit, found: int) -> SourceChanged:
        return SourceChanged(
            f"{self.path}: unit {unit.index}",
            found=f"{found} rows",
            wanted=f"{unit.rows} rows, as when the plan was made",
            fix="put the source back as it was, or capture into another output",
        )


class JsonLines(Source):
    """One JSON object per line; `start` of a unit is a byte offset. Blank lines are no rows."""

    def plan(self, rows_per_unit: int) -> list[Unit]:
        starts: list[int] = []
        rows = offset = 0
        with fsspec.open(self.path, "rb") as file, _byte_bar(file, "plan") as bar:
            for line in file:
                if line.strip():
                    if rows % rows_per_unit == 0:
                        starts.append(offset)
                    rows += 1
                offset += len(line)
                bar.update(len(line))
        return _units(self.path, starts, rows, rows_per_unit)

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        read = 0
        with fsspec.open(self.path, "rb") as file:
            file.seek(unit.start)
            for line in file:
                if read == unit.rows:
                    break
                if line.strip():
                    yield _parsed(unit.first_row + read, line)
                    read += 1
        if read < unit.rows:
            raise self._changed(unit, read)


class ParquetRows(Source):
    """Rows of a Parquet file; `start` of a unit is a row number."""

    def plan(self, rows_per_unit: int) -> list[Unit]:
        with fsspec.open(self.path, "rb") as file:
            rows = self._opened(file).metadata.num_rows
        return _units(self.path, list(range(0, rows, rows_per_unit)), rows, rows_per_unit)

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        stop = unit.start + unit.rows
        with fsspec.open(self.path, "rb") as file:
            parquet = self._opened(file)
            if parquet.metadata.num_rows < stop:
                raise self._changed(unit, max(0, parquet.metadata.num_rows - unit.start))
            first = 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                low, high = max(unit.start, first), min(stop, first + rows)
                if low < high:
                    table = parquet.read_row_group(group).slice(low - first, high - low)
                    for number, columns in enumerate(table.to_pylist(), start=low):
                        yield SourceRow(number, columns)
                first += rows

    def _opened(self, file: Any) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise SourceUnreadable(self.path, found=str(error), wanted="a whole Parquet file") from None


_KINDS: dict[str, type[Source]] = {".jsonl": JsonLines, ".json": JsonLines, ".parquet": ParquetRows}


def open_source(path: str) -> Source:
    """The source at `path`. Raises `SourceNotFound` or `SourceUnreadable`."""
    kind = next((kind for ending, kind in _KINDS.items() if path.endswith(ending)), None)
    if kind is None:
        raise SourceUnreadable(
            path,
            found="an unknown ending",
            wanted=", ".join(_KINDS),
            fix="convert it to JSON lines or Parquet; datasets can write both: `to_json`, `to_parquet`",
        )
    fs, inner = fsspec.core.url_to_fs(path)
    if not fs.isfile(inner):
        raise SourceNotFound(path, found="no such file", wanted="a .jsonl or .parquet file", fix="check source.path")
    return kind(path)


def _byte_bar(file: Any, what: str) -> tqdm:
    """A bar over the file's bytes, shown only where it takes longer than three seconds."""
    return tqdm(total=getattr(file, "size", None), unit="B", unit_scale=True, desc=what, delay=3)


def _units(path: str, starts: list[int], rows: int, rows_per_unit: int) -> list[Unit]:
    if not rows:
        raise SourceEmpty(path, found="no rows", wanted="at least one row", fix="check source.path")
    return [
        Unit(index, start, index * rows_per_unit, min(rows_per_unit, rows - index * rows_per_unit))
        for index, start in enumerate(starts)
    ]


def _parsed(number: int, line: bytes) -> SourceRow:
    try:
        columns = json.loads(line)
    except ValueError as error:
        return SourceRow(number, None, f"not JSON: {error}")
    if not isinstance(columns, dict):
        return SourceRow(number, None, f"not a JSON object but {type(columns).__name__}")
    return SourceRow(number, columns)
