"""JSON Lines, plain or compressed: one JSON object per line; blank lines are not rows. And whole JSON documents.

A unit of plain lines starts at a byte offset, counted over all files in their order. Only JSON is checked here: a line
that is not an object becomes a row with a problem.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from array import array
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from coldstill.pipeline.errors import SourceUnreadable
from coldstill.storage_schema.plan import Unit

from .files import ByteMeter, Reader, SourceFile, SourceRow, Stream, Survey, changed, opened, opened_for, parse_row

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAX_ROW_BYTES = 256 << 20
"""Maximum length of a line. A file without a line end for that long does not hold lines."""
MAX_ARRAY_BYTES = 2 << 30
"""Maximum length of a JSON document, whose rows are in memory at once."""
_READ_BYTES = 1 << 20
_PEEKED_BYTES = 64 << 10
_WRAPPED = re.compile(rb'\{\s*"data"\s*:\s*\[')
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # begins with that of UTF-16
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


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
                first_byte = start - (stop - (file.bytes or 0))
                _seek_line(handle, first_byte, name=file.name, unit=unit)
                for line in _lines(handle.read, name=file.name, starts_file=not first_byte):
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
                with meter.opened(file) as read:
                    for line in _lines(read, name=file.name, compression=_compression_of(file.name)):
                        if line := line.strip():
                            yield line
        self.sha256 = meter.sha256


class JsonDocuments(Stream):
    """Files that are one JSON document each: an array of rows, or an object with such an array as `data`."""

    def documents(self) -> Iterator[bytes]:
        with ByteMeter(self.files, "reading the source") as meter:
            for file in self.files:
                with meter.opened(file) as read:
                    yield from _items(read, name=file.name)
        self.sha256 = meter.sha256


def is_document(file: SourceFile) -> bool:
    """Whether a JSON file is one document instead of lines, by its first bytes."""
    with opened(file) as handle:
        start = _buffered(handle.read, _compression_of(file.name)).read(_PEEKED_BYTES)
    start = start.removeprefix(codecs.BOM_UTF8).strip()
    line, end, _ = start.partition(b"\n")
    if line.startswith(b"[") or not line.startswith(b"{"):
        return line.startswith(b"[")
    if _WRAPPED.match(start):
        return True
    try:
        json.loads(line)
    except ValueError:
        return bool(end) and line.strip() == b"{"  # an object over several lines
    return False


def _items(read: Callable[[int], bytes], *, name: str) -> Iterator[bytes]:
    """The elements of the array in a JSON document. Raises `SourceUnreadable`."""
    data = _buffered(read, _compression_of(name)).read(MAX_ARRAY_BYTES + 1)
    _require_utf8(data[:4], name=name)
    fix = "write it as JSON Lines, one row on each line; datasets can: `to_json`"
    if len(data) > MAX_ARRAY_BYTES:
        found = f"a JSON document of more than {MAX_ARRAY_BYTES:,} bytes"
        raise SourceUnreadable(name, found=found, wanted="a smaller one, which is read whole", fix=fix)
    try:
        whole = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceUnreadable(name, found=f"no JSON document: {error}", wanted="an array of rows", fix=fix) from None
    rows = whole.get("data") if isinstance(whole, dict) else whole
    if not isinstance(rows, list):
        keys = f"an object with the keys {', '.join(list(whole)[:10])}" if isinstance(whole, dict) else "no array"
        raise SourceUnreadable(name, found=keys, wanted="an array of rows, or an object with one as data", fix=fix)
    for row in rows:
        yield json.dumps(row).encode()


def _compression_of(name: str) -> str | None:
    return COMPRESSIONS.get(Path(name.lower()).suffix)


def _buffered(read: Callable[[int], bytes], compression: str | None) -> io.BufferedReader:
    if compression:
        read = pa.CompressedInputStream(pa.PythonFile(_RawFile(read), mode="r"), compression).read
    return io.BufferedReader(_RawFile(read), _READ_BYTES)


def _require_utf8(start: bytes, *, name: str) -> None:
    """Raise `SourceUnreadable` for a file that begins like UTF-16 or UTF-32."""
    found = next((f"a byte order mark of {what}" for mark, what in _OTHER_MARKS if start.startswith(mark)), None)
    if found is None and start[:1] in b"{[\0" and b"\0" in start[:2] and start.strip(b"\0"):
        found = "UTF-16 or UTF-32 without a byte order mark"
    if found:
        fix = f"convert it, for instance: iconv -f UTF-16 -t UTF-8 {name} > converted.jsonl"
        raise SourceUnreadable(name, found=found, wanted="UTF-8", fix=fix)


def _lines(
    read: Callable[[int], bytes], *, name: str, compression: str | None = None, starts_file: bool = True
) -> Iterator[bytes]:
    """Lines with their ends, from a function that reads bytes.

    Raises `SourceUnreadable` for damaged compression, for a line of `MAX_ROW_BYTES` or more, and for a file in UTF-16.
    """
    buffered = _buffered(read, compression)
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
        if number == 1 and starts_file:
            _require_utf8(line[:4], name=name)
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
