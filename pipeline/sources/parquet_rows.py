"""Rows of Parquet files.

A unit starts at a row number, counted over all files in their order. Reading a unit reads only the row groups that hold
its rows, and of the last one only up to the end of the unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.common.progress import tqdm
from coldstill.pipeline.errors import SourceUnreadable
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.storage_schema.plan import Unit

from .files import (
    ByteMeter,
    Reader,
    SourceFile,
    SourceRow,
    Stream,
    Survey,
    changed,
    json_text,
    opened,
    opened_for,
    without_nulls,
)

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20
"""With a buffer Arrow reads a column chunk in blocks instead of whole."""
_WIDE_BYTES = 128 << 20
"""Size of a row group above which the rows are copied to `staging/` instead of read in place."""


class ParquetRows(Reader):
    """Rows of one or several files."""

    def rows(self, only: str | None = None) -> Iterator[SourceRow]:
        """All rows in order; with `only`, just that column."""
        number = 0
        for file in self.files:
            with _parquet(file) as parquet:
                yield from _rows(parquet, file, 0, parquet.metadata.num_rows, number=number, only=only)
                number += parquet.metadata.num_rows

    def is_wide(self) -> bool:
        """Whether a file has row groups of more than 128 MiB: each unit would read many rows of other units."""
        for file in self._with_bar():
            with _parquet(file) as parquet:
                groups = (parquet.metadata.row_group(number) for number in range(parquet.num_row_groups))
                if any(group.num_rows > 1 and group.total_byte_size > _WIDE_BYTES for group in groups):
                    return True
        return False

    def survey(self, rows_per_unit: int) -> Survey:
        files = []
        for file in self._with_bar():
            with _parquet(file) as parquet:
                files.append(file.model_copy(update={"rows": parquet.metadata.num_rows}))
        with ByteMeter(self.files, "reading the source") as meter:
            for file in self.files:
                with meter.opened(file):
                    pass
        return Survey(meter.sha256, sum(file.rows for file in files), None, tuple(files))

    def _with_bar(self) -> Iterable[SourceFile]:
        return tqdm(self.files, desc="footers", unit=" files", delay=3)

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        end, number = unit.start + unit.rows, unit.first_row
        for file, stop in zip(self.files, accumulate(file.rows for file in self.files), strict=True):
            start = stop - file.rows
            low, high = max(unit.start, start) - start, min(end, stop) - start
            if low >= high:
                continue
            with _parquet(file, unit=unit) as parquet:
                if parquet.metadata.num_rows != file.rows:
                    found, wanted = f"{parquet.metadata.num_rows} rows in the file", f"{file.rows} rows in the file"
                    raise changed(file.name, unit=unit, found=found, wanted=wanted)
                yield from _rows(parquet, file, low, high, number=number)
                number += high - low
        if number < unit.first_row + unit.rows:
            found, wanted = f"{number - unit.first_row} rows", f"{unit.rows} rows"
            raise changed(self.files[-1].name, unit=unit, found=found, wanted=wanted)


class WideParquet(Stream):
    """Parquet in row groups that are too large to be read again for each unit."""

    def documents(self) -> Iterator[bytes]:
        rows = ParquetRows(self.files)
        survey = rows.survey(1)
        with tqdm(total=survey.rows, desc="reading the source", unit=" rows", delay=3) as bar:
            for row in rows.rows():
                yield _document(row)
                bar.update()
        self.sha256 = survey.sha256


@contextmanager
def _parquet(file: SourceFile, *, unit: Unit | None = None) -> Iterator[pq.ParquetFile]:
    with opened(file) if unit is None else opened_for(unit, file) as handle:
        try:
            parquet = pq.ParquetFile(handle, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise _named(file, error) from None
        yield parquet


def _rows(
    parquet: pq.ParquetFile, file: SourceFile, low: int, high: int, *, number: int, only: str | None = None
) -> Iterator[SourceRow]:
    """Rows `low` to `high` of a file; the first one is row `number` of the source."""
    first = 0
    wanted = [only] if only in parquet.schema_arrow.names else None
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if first < high and low < first + rows:
            start = first
            batches = parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=wanted)
            while start < high:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    raise _named(file, error) from None
                if batch is None:
                    break
                stop = start + batch.num_rows
                if stop > low:
                    offset = max(0, low - start)
                    wanted_rows = batch.slice(offset, min(high, stop) - start - offset)
                    yield from _of_batch(wanted_rows, number + max(low, start) - low)
                start = stop
        first += rows


def _of_batch(batch: pa.RecordBatch, number: int) -> Iterator[SourceRow]:
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # each row alone, to find those that Python cannot hold
        yield from (_of_row(batch.slice(index, 1), number + index) for index in range(batch.num_rows))
        return
    for index, row in enumerate(rows):
        yield SourceRow(number + index, {name: without_nulls(value) for name, value in row.items()})


def _of_row(row: pa.RecordBatch, number: int) -> SourceRow:
    """The one row of a batch. Arrow checks neither text nor times: a time outside of Python's becomes Arrow's text."""
    columns: dict[str, object] = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            columns[name] = without_nulls(column[0].as_py())
        except UnicodeDecodeError as error:
            return SourceRow(number, None, f"not UTF-8: column {name!r}: {error}", reason=RejectReason.NOT_UTF8)
        except (ValueError, OverflowError) as error:
            try:
                columns[name] = column[0].cast(pa.string()).as_py()
            except pa.ArrowException:
                return SourceRow(number, None, f"column {name!r} holds a value that cannot be read: {error}")
    return SourceRow(number, columns)


def _document(row: SourceRow) -> bytes:
    """A row as JSON; of one that cannot be read, its problem, which `parse_row` rejects for the same reason."""
    if row.columns is not None:
        return json_text(row.columns)
    return row.problem.encode() + (b"\xff" if row.reason is RejectReason.NOT_UTF8 else b"")


def _named(file: SourceFile, error: Exception) -> Exception:
    """What Arrow found wrong with a file. An error of the disk or network is returned as it is: `opened` names it."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        return error
    return SourceUnreadable(
        file.name, found=str(error), wanted="a whole Parquet file", fix="download or write the file again"
    )
