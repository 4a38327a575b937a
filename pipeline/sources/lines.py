"""JSON lines: one object per line, blank lines are no rows. A unit starts at a byte of the files laid end to end.

Files in, rows out. Damage is looked for line by line: a line that is no object is a row with a problem.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np

from coldstill.storage_schema.plan import Unit

from .files import ByteMeter, lines_of, opened, opened_for
from .rows import Reader, SourceRow, Survey, changed, parsed


class JsonLines(Reader):
    """Lines of one file or of several."""

    def rows(self) -> Iterator[SourceRow]:
        number = 0
        for file in self.files:
            with opened(file) as handle:
                for line in lines_of(handle.read, name=file.name):
                    if line.strip():
                        yield parsed(number, line)
                        number += 1

    def survey(self, rows_per_unit: int) -> Survey:
        starts = array("q")
        rows = offset = 0
        files = []
        with ByteMeter(self.files, "reading the source") as meter:
            for file in self.files:
                start, before = offset, rows
                with meter.opened(file) as read:
                    for line in lines_of(read, name=file.name):
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
                for line in lines_of(handle.read, name=file.name):
                    if line.strip():
                        yield parsed(unit.first_row + done, line)
                        done += 1
                    if done == unit.rows:
                        return
            start = stop
        raise changed(self.files[-1].name, unit=unit, found=f"{done} rows", wanted=f"{unit.rows} rows")


def _seek_line(handle: Any, start: int, *, name: str, unit: Unit) -> None:
    """Go to a byte at which a line starts."""
    handle.seek(max(0, start - 1))
    if start and handle.read(1) != b"\n":
        raise changed(name, unit=unit, found=f"no line that starts at byte {start}", wanted="one")
