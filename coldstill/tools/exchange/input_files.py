"""Reads other tools' Parquet and JSON lines as one long table.

Parquet is read a few rows at a time, JSON lines one line at a time, and a file is opened only when its rows are needed:
a source may be far larger than memory. No number becomes a Python object.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from coldstill.common.progress import tqdm
from coldstill.storage_schema.errors import InvalidHeader
from coldstill.storage_schema.header_facts import ImportFacts
from coldstill.storage_schema.parquet import check_foreign_footer
from coldstill.storage_schema.verified_files import MAX_COUNT
from coldstill.tools.errors import SourceUnreadable, UnusableRow, invalid_field

ROWS_PER_BATCH = 8
MAX_LINE_BYTES = 256 << 20
_BLOCK = 8 << 20

MAX_ENTRIES = 1 << 27
"""Limit of the entries of a row once all its positions are as wide as the widest: 1 GiB of float64."""


@dataclass(frozen=True)
class InputFile:
    """A file of an import's source. `name` is relative to the source; `path` is the path in the file system."""

    name: str
    path: str
    fs: fsspec.AbstractFileSystem

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return self.name.rsplit(".", 1)[0]


class Batch(NamedTuple):
    """Consecutive rows of `file`, or the error of a single row. `first_row`: number of the first within the file."""

    file: InputFile
    first_row: int
    table: pa.RecordBatch | UnusableRow


class Tables(Protocol):
    """The rows of all input files, as Parquet and JSON lines both provide them."""

    names: list[str]

    def __len__(self) -> int:
        """Rows of all files."""

    def batches(self, start: int, *, columns: Sequence[str]) -> Iterator[Batch]:
        """Rows from number `start` on, with those of `columns` that exist."""


def import_facts(files: Sequence[InputFile], *, tool: str, version: str | None, layout: str) -> ImportFacts:
    """What an import reads. Only names that `source_digest` covers: equal files give equal datasets wherever they lie.

    Raises `InvalidHeader` for a version that is too long for the header.
    """
    first = files[0].name.encode(errors="replace").decode()[-256:]
    fields = {"tool": tool, "tool_version": version, "layout": layout, "first_file": first, "files": len(files)}
    try:
        return ImportFacts.model_validate(fields)
    except ValidationError as failure:
        raise invalid_field(failure, where="import", error=InvalidHeader) from None


def input_files(source: str | Path | Sequence[str | Path], *, endings: tuple[str, ...]) -> list[InputFile]:
    """The files of a folder and its subfolders, or the given files, in natural order: `data_2` before `data_10`.

    Paths are local or fsspec URLs. Raises `SourceUnreadable` if there is no file, if formats are mixed, and if two
    files have the same name.
    """
    paths = [source] if isinstance(source, (str, Path)) else source
    files = [file for path in paths for file in _files_at(str(path), endings)]
    if not files:
        raise SourceUnreadable(str(source), found="no file", wanted=f"at least one {' or '.join(endings)}")
    formats = {file.name.rsplit(".", 1)[-1] for file in files}
    if len(formats) > 1:
        raise SourceUnreadable(str(source), found=f"files of formats {sorted(formats)}", wanted="files of one format")
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceUnreadable(twice, found="two files of this name", wanted="different names: row ids contain them")
    return sorted(files, key=lambda file: _parts(file.name))


def source_digest(files: Sequence[InputFile], *, settings: Mapping[str, Any], progress: bool) -> str:
    """sha256 of the settings that decide what the bytes mean, and of each file's name and bytes."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with tqdm(files, desc="digest", unit=" files", disable=not progress) as bar:
        for file in bar:
            own = hashlib.sha256()
            with file.fs.open(file.path, "rb") as stream:
                while block := stream.read(_BLOCK):
                    own.update(block)
            digest.update(json.dumps([file.name, own.hexdigest()]).encode())
    return digest.hexdigest()


class ParquetTables:
    """Parquet files with the columns of the first file. Raises `SourceUnreadable`."""

    def __init__(self, files: Sequence[InputFile]):
        self._files = files
        self._group_rows: list[list[int]] = []
        for file in files:
            with self._open(file) as parquet:
                metadata = parquet.metadata
                self._group_rows.append([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
                if len(self._group_rows) == 1:
                    self.schema = parquet.schema_arrow
        self.names = list(self.schema.names)
        self._first_rows = [0, *itertools.accumulate(map(sum, self._group_rows))]
        if self._first_rows[-1] > MAX_COUNT:
            raise SourceUnreadable("source", found=f"{self._first_rows[-1]} rows", wanted=f"at most {MAX_COUNT}")

    def __len__(self) -> int:
        """Rows of all files."""
        return self._first_rows[-1]

    def batches(self, start: int, *, columns: Sequence[str]) -> Iterator[Batch]:
        """Rows from number `start` on, a few at a time."""
        wanted = [name for name in columns if name in self.names]
        for index in range(max(bisect.bisect_right(self._first_rows, start) - 1, 0), len(self._files)):
            yield from self._of_file(index, max(start - self._first_rows[index], 0), wanted)

    def _of_file(self, index: int, start: int, columns: list[str]) -> Iterator[Batch]:
        file = self._files[index]
        with self._open(file) as parquet:
            absent = sorted(set(columns) - set(parquet.schema_arrow.names))
            if absent:
                raise SourceUnreadable(f"{file.name}: columns", found=f"no {absent}", wanted="those of the first file")
            first_row = 0
            for group, rows in enumerate(self._group_rows[index]):
                if first_row + rows <= start:
                    first_row += rows
                    continue
                try:
                    for table in parquet.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns):
                        skipped = min(max(start - first_row, 0), table.num_rows)
                        if skipped < table.num_rows:
                            yield Batch(file, first_row + skipped, table.slice(skipped))
                        first_row += table.num_rows
                except (pa.ArrowException, OSError) as error:
                    raise _unreadable(file, error) from None

    @contextmanager
    def _open(self, file: InputFile) -> Iterator[pq.ParquetFile]:
        with file.fs.open(file.path, "rb") as stream:  # a ParquetFile does not close a stream that it did not open
            try:
                check_foreign_footer(stream)
                stream.seek(0)
                parquet = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise _unreadable(file, error) from None
            yield parquet


class JsonTables:
    """Files with one JSON object per line; `to_table` turns an object into a row with the columns of a Parquet file.

    A line that is not an object, or whose values have other types, becomes an `UnusableRow` instead of a table.
    """

    def __init__(self, files: Sequence[InputFile], *, to_table: Callable[[dict[str, Any]], pa.RecordBatch]):
        self._files = files
        self._to_table = to_table
        self._starts = [array("q", _line_starts(file)) for file in files]
        self._first_rows = [0, *itertools.accumulate(map(len, self._starts))]
        first = next(self.batches(0, columns=()), None)
        if first is None:
            raise SourceUnreadable(files[0].name, found="no line", wanted="at least one row")
        if isinstance(first.table, UnusableRow):
            raise first.table
        self.names = list(first.table.schema.names)

    def __len__(self) -> int:
        """Lines of all files that are not blank."""
        return self._first_rows[-1]

    def batches(self, start: int, *, columns: Sequence[str]) -> Iterator[Batch]:
        """Rows from number `start` on, one at a time, with all their columns."""
        for index in range(max(bisect.bisect_right(self._first_rows, start) - 1, 0), len(self._files)):
            file, starts = self._files[index], self._starts[index]
            with file.fs.open(file.path, "rb") as stream:
                for row in range(max(start - self._first_rows[index], 0), len(starts)):
                    stream.seek(starts[row])
                    yield Batch(file, row, self._table(stream.readline(), where=f"{file.name}, row {row}"))

    def _table(self, line: bytes, *, where: str) -> pa.RecordBatch | UnusableRow:
        try:
            document = json.loads(line)
            if not isinstance(document, dict):
                raise ValueError(f"a {type(document).__name__}")
            return self._to_table(document)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, pa.ArrowException) as error:
            detail = f"{type(error).__name__}: {str(error)[:200]}"
            return UnusableRow(where, found=detail, wanted="one JSON object with the columns of the layout")


def _files_at(path: str, endings: tuple[str, ...]) -> Iterator[InputFile]:
    fs, root = fsspec.core.url_to_fs(path)
    root = str(root).rstrip("/")
    if fs.isdir(root):
        for found in fs.find(root):
            name = str(found)[len(root) :].lstrip("/")
            if name.endswith(endings) and not any(part.startswith((".", "_")) for part in name.split("/")):
                yield InputFile(name, str(found), fs)
    elif not fs.exists(root):
        raise SourceUnreadable(path, found="no such file or folder", wanted=f"{' or '.join(endings)}")
    else:
        yield InputFile(root.rsplit("/", 1)[-1], root, fs)


def _parts(name: str) -> list[str | int]:
    """Text and numbers alternating, text first, so that names are compared part by part."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def _line_starts(file: InputFile) -> Iterator[int]:
    with file.fs.open(file.path, "rb") as stream:
        start = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise SourceUnreadable(
                    f"{file.name}: line at byte {start}",
                    found="a longer line",
                    wanted=f"at most {MAX_LINE_BYTES} bytes",
                )
            if not start and b"\0" in line[:4]:  # json would guess the encoding, line by line
                raise SourceUnreadable(
                    file.name,
                    found="zero bytes at its start, as in UTF-16 and UTF-32",
                    wanted="UTF-8",
                    fix=f"convert it first: iconv -f UTF-16 -t UTF-8 {file.name} > utf8.jsonl",
                )
            if line.strip():
                yield start
            start += len(line)


def _unreadable(file: InputFile, error: Exception) -> SourceUnreadable:
    return SourceUnreadable(file.name, found=f"{type(error).__name__}: {error}", wanted="a whole Parquet file")


def values_of(table: pa.RecordBatch, row: int, name: str) -> np.ndarray | None:
    """The numbers of a list column in one row; None if it is null or absent. Raises `UnusableRow` for other types."""
    if name not in table.schema.names or not table.column(name)[row].is_valid:
        return None
    column = _require_list(table.column(name), name)
    return numbers(column.slice(row, 1).flatten(), name)


def nested_of(table: pa.RecordBatch, row: int, name: str) -> tuple[pa.Array, np.ndarray] | None:
    """A list-of-lists column in one row: all entries end to end, and the entries of each position (`int64 [n]`, 0 for a
    null position). None if it is null or absent. Raises `UnusableRow` for other types."""
    if name not in table.schema.names or not table.column(name)[row].is_valid:
        return None
    outer = _require_list(table.column(name), name)
    inner = _require_list(outer.slice(row, 1).flatten(), name)
    lengths = inner.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return inner.flatten(), lengths


def check_size(name: str, *, positions: int, width: int) -> None:
    """Raise `UnusableRow` before arrays are allocated that are larger than any row of a dataset needs."""
    if positions * width > MAX_ENTRIES:
        raise UnusableRow(
            name, found=f"{positions} positions of {width} entries", wanted=f"at most {MAX_ENTRIES} entries"
        )


def check_token_ids(token_ids: np.ndarray, *, token_count: int) -> None:
    """Raise `UnusableRow` for ids that the tokenizer does not have, and for numbers that are no integers."""
    if token_ids.dtype.kind == "f" and not (token_ids == np.trunc(token_ids)).all():
        raise UnusableRow("input_ids", found="a fraction or NaN", wanted="integers")
    if token_ids.size and (token_ids.min() < 0 or token_ids.max() >= token_count):
        raise UnusableRow(
            "input_ids", found=f"{token_ids.min()}..{token_ids.max()}", wanted=f"ids in 0..{token_count - 1}"
        )


def numbers(values: pa.Array, name: str) -> np.ndarray:
    """The numbers of a flat array. Raises `UnusableRow` for nulls and other types."""
    kind = values.type
    if values.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        found = f"{values.null_count} nulls" if values.null_count else str(kind)
        raise UnusableRow(name, found=found, wanted="numbers")
    return values.to_numpy(zero_copy_only=False)


class Rounding(NamedTuple):
    """The largest change of a log-prob by the way it was written down: a decimal place, or a float's last bit."""

    decimals: int | None
    bits: int

    def of(self, values: np.ndarray) -> np.ndarray:
        """The bound for each of `values`; a whole last place, because some writers cut digits off."""
        step = np.ldexp(1.0, np.frexp(np.where(np.isfinite(values), values, 0.0))[1] - self.bits)
        return step if self.decimals is None else np.maximum(step, 10.0**-self.decimals)


def rounding_of(values: np.ndarray) -> Rounding:
    """The coarsest rounding that leaves all of `values` unchanged; zeros show none.

    It is read from the values, because a column's type may be wider: float16 values in JSON or in a float32 column.
    """
    values = values[values != 0]
    if not values.size:
        return Rounding(None, 24)
    with np.errstate(over="ignore"):
        bits = next((b for b in (8, 11, 24) if (_to_bits(values, b) == values).all()), 53)
    close = 2.0**-24 if bits == 24 else 1e-14  # float32 holds a decimal number no better
    places = (d for d in range(10) if (np.abs(np.round(values, d) - values) <= close * np.abs(values)).all())
    return Rounding(next(places, None), bits)


def _to_bits(values: np.ndarray, bits: int) -> np.ndarray:
    fraction, exponent = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(fraction, bits)), exponent - bits)


def text_of(table: pa.RecordBatch, row: int, name: str) -> str | None:
    """The value of a string or number column in one row, as text; None if it is null or absent.

    Raises `UnusableRow` for text that is not UTF-8, and for a time that Python does not have.
    """
    if name not in table.schema.names:
        return None
    try:
        value = table.column(name)[row].as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise UnusableRow(name, found=f"{type(error).__name__}: {error}"[:200], wanted="UTF-8 text") from None
    return None if value is None else str(value)


def _require_list(values: pa.Array, name: str) -> pa.Array:
    if pa.types.is_fixed_size_list(values.type):
        values = values.cast(pa.list_(values.type.value_type))
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        raise UnusableRow(name, found=str(values.type), wanted="lists")
    return values
