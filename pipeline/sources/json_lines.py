"""JSON Lines, plain or compressed: one JSON object per line; blank lines are not rows.

A unit of plain lines starts at a byte offset, counted over all files in their order. Only JSON is checked here: a line
that is not an object becomes a row with a problem.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from coldstill.pipeline.errors import SourceUnreadable
from coldstill.storage_schema.plan import Unit

from .files import ByteMeter, Reader, SourceRow, Stream, Survey, changed, opened, opened_for, parse_row

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAX_ROW_BYTES = 256 << 20
"""Maximum length of a line. A file without a line end for that long does not hold lines."""
_READ_BYTES = 1 << 20


class JsonLines(Reader):
    """Lines of one or several files."""

    def rows(self) -> Iterator[SourceRow]:
        number = 0
        for file in self.files:
            with opened(file) as handle:
                for line in _lines(handle.read, name=file.name):
                    if line.strip():
                        yield parse_row(number, line)
                        number += 1

    def survey(self, rows_per_unit: int) -> Survey:
        starts = array("q")
        rows = offset = 0
        files = []
        with ByteMeter(self.files, "reading the source") as meter:
            for file in self.files:
                start, before = offset, rows
                with meter.opened(file) as read:
                    for line in _lines(read, name=file.name):
                        if line.strip():
                            if rows % rows_per_unit == 0:
                                starts.append(offset)
                            rows += 1
                        offset += len(line)
                files.append(file.model_copy(update={"bytes": offset - start, "rows": rows - before}))
        return Survey(meter.sha256, rows, np.frombuffer(starts, np.int64), tuple(files))

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        done, start = 0, unit.start
        stops = list(accumulate(file.bytes or 0 for file in self.files))
        for file, stop in zip(self.files, stops, strict=True):
            if stop <= unit.start:
                continue
            with opened_for(unit, file) as handle:
                _seek_line(handle, start - (stop - (file.bytes or 0)), name=file.name, unit=unit)
                for line in _lines(handle.read, name=file.name):
                    if line.strip():
                        yield parse_row(unit.first_row + done, line)
                        done += 1
                    if done == unit.rows:
                        return
            start = stop
        raise changed(self.files[-1].name, unit=unit, found=f"{done} rows", wanted=f"{unit.rows} rows")


class CompressedLines(Stream):
    """Lines of files of which some are compressed; a pattern may match plain files too."""

    def documents(self) -> Iterator[bytes]:
        with ByteMeter(self.files, "reading the source") as meter:
            for file in self.files:
                compression = COMPRESSIONS.get(Path(file.name).suffix)
                with meter.opened(file) as read:
                    for line in _lines(read, name=file.name, compression=compression):
                        if line := line.strip():
                            yield line
        self.sha256 = meter.sha256


def _lines(read: Callable[[int], bytes], *, name: str, compression: str | None = None) -> Iterator[bytes]:
    """Lines with their ends, from a function that reads bytes.

    Raises `SourceUnreadable` for damaged compression, and for a line of `MAX_ROW_BYTES` or more.
    """
    if compression:
        read = pa.CompressedInputStream(pa.PythonFile(_RawFile(read), mode="r"), compression).read
    buffered = io.BufferedReader(_RawFile(read), _READ_BYTES)
    number = 0
    while True:
        try:
            line = buffered.readline(MAX_ROW_BYTES)
        except OSError as error:
            if not compression:
                raise
            raise SourceUnreadable(
                f"{name}: after line {number}",
                found=str(error),
                wanted=f"a whole {compression} file",
                fix="download or write the file again, or compress its readable part again",
            ) from None
        if not line:
            return
        number += 1
        if len(line) == MAX_ROW_BYTES:
            raise SourceUnreadable(
                f"{name}: line {number}",
                found=f"{MAX_ROW_BYTES:,} bytes without a line end",
                wanted="one row on each line",
            )
        yield line


class _RawFile(io.RawIOBase):
    """The part of a file that `io.BufferedReader` and Arrow need, around a function that reads bytes."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _seek_line(handle: Any, start: int, *, name: str, unit: Unit) -> None:
    """Seek to a byte at which a line starts."""
    handle.seek(max(0, start - 1))
    if start and handle.read(1) != b"\n":
        raise changed(name, unit=unit, found=f"no line that starts at byte {start}", wanted="one")
