"""Files of other tools as one long table: a folder or files in, record batches from any row on out.

Parquet is read row group by row group and a few rows at a time; JSON lines one line at a time. A file is opened only
when its rows are due, so a source may be far larger than memory.
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
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .errors import SourceUnreadable, UnusableRow

ROWS_PER_BATCH = 8
MAX_LINE_BYTES = 256 << 20
_BLOCK = 8 << 20


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: `name` is relative to the source, `path` is the file system's own."""

    name: str
    path: str
    fs: fsspec.AbstractFileSystem

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return self.name.rsplit(".", 1)[0]


class Batch(NamedTuple):
    """Rows `first_row..` of `file` (the number counts within the file), or the reason why its one row has no table."""

    file: SourceFile
    first_row: int
    table: pa.RecordBatch | UnusableRow


class Tables(Protocol):
    """What both kinds of files give."""

    names: list[str]

    def __len__(self) -> int:
        """Rows of all files."""

    def batches(self, start: int, *, columns: Sequence[str]) -> Iterator[Batch]:
        """Rows from number `start` on, with those of `columns` that there are."""


def source_files(source: str | Path | Sequence[str | Path], *, endings: tuple[str, ...]) -> list[SourceFile]:
    """The files of a folder (and the folders in it), or the given ones, in natural order: `data_2` before `data_10`.

    Paths are local or fsspec URLs. Raises `SourceUnreadable` where there is none, where kinds are mixed, and where two
    have one name.
    """
    paths = [source] if isinstance(source, (str, Path)) else source
    files = [file for path in paths for file in _files_at(str(path), endings)]
    if not files:
        raise SourceUnreadable(str(source), found="no file", wanted=f"at least one {' or '.join(endings)}")
    kinds = {file.name.rsplit(".", 1)[-1] for file in files}
    if len(kinds) > 1:
        raise SourceUnreadable(str(source), found=f"files of kinds {sorted(kinds)}", wanted="files of one kind")
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceUnreadable(twice, found="two files of this name", wanted="names that tell rows apart")
    return sorted(files, key=lambda file: [int(part) if part.isdigit() else part for part in _parts(file.name)])


def source_digest(files: Sequence[SourceFile], *, settings: Mapping[str, Any], progress: bool) -> str:
    """sha256 over the settings that decide what the bytes mean, and over each file's name and bytes."""
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
    """Parquet files with the columns that the first of them has. Raises `SourceUnreadable`."""

    def __init__(self, files: Sequence[SourceFile]):
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
    def _open(self, file: SourceFile) -> Iterator[pq.ParquetFile]:
        with file.fs.open(file.path, "rb") as stream:  # a ParquetFile leaves open what it is given open
            try:
                parquet = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise _unreadable(file, error) from None
            yield parquet


class JsonTables:
    """Files with one JSON object per line; `to_table` gives a line's object the columns of a Parquet file.

    A line that is no object, or whose values have other types, is an `UnusableRow` in the place of its table.
    """

    def __init__(self, files: Sequence[SourceFile], *, to_table: Callable[[dict[str, Any]], pa.RecordBatch]):
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
        """Rows from number `start` on, one at a time, with all columns that they have."""
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


def _files_at(path: str, endings: tuple[str, ...]) -> Iterator[SourceFile]:
    fs, root = fsspec.core.url_to_fs(path)
    root = str(root).rstrip("/")
    if fs.isdir(root):
        for found in fs.find(root):
            name = str(found)[len(root) :].lstrip("/")
            if name.endswith(endings) and not any(part.startswith((".", "_")) for part in name.split("/")):
                yield SourceFile(name, str(found), fs)
    elif not fs.exists(root):
        raise SourceUnreadable(path, found="no such file or folder", wanted=f"{' or '.join(endings)}")
    else:
        yield SourceFile(root.rsplit("/", 1)[-1], root, fs)


def _parts(name: str) -> list[str]:
    """Text and digits in turn, text first, so that names compare part by part."""
    return re.split(r"([0-9]+)", name)


def _line_starts(file: SourceFile) -> Iterator[int]:
    with file.fs.open(file.path, "rb") as stream:
        start = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise SourceUnreadable(
                    f"{file.name}: line at byte {start}", found="a longer one", wanted=f"at most {MAX_LINE_BYTES} bytes"
                )
            if line.strip():
                yield start
            start += len(line)


def _unreadable(file: SourceFile, error: Exception) -> SourceUnreadable:
    return SourceUnreadable(file.name, found=f"{type(error).__name__}: {error}", wanted="a whole Parquet file")
