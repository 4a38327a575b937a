"""The plan: which source rows each work unit has.

It is written once, before any unit is dispatched, and never changes. A unit is a fixed slice of the source and becomes
one shard; a resumed capture repeats whole units. Units do not depend on the number of workers. A plan is stored as
columns: a million units take 20 MB, as objects they would take 300.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa

from .errors import CommitDamaged
from .parquet import required, table_from_bytes, table_to_bytes

PLAN_NAME = "plan.parquet"
MAX_UNITS = 1_000_000
_SCHEMA = pa.schema(
    [
        required("start", pa.int64()),
        required("first_row", pa.int64()),
        required("rows", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Unit:
    """Work unit number `index`: `rows` source rows from row `first_row` on. `start`: where they begin in the source, a
    byte offset for line files, a row number otherwise."""

    index: int
    start: int
    first_row: int
    rows: int


class Plan(Sequence[Unit]):
    """All `U` units by index: columns `start int64 [U]`, `first_row int64 [U]`, `rows int32 [U]`."""

    def __init__(self, *, start: np.ndarray, first_row: np.ndarray, rows: np.ndarray):
        self.start, self.first_row = np.asarray(start, np.int64), np.asarray(first_row, np.int64)
        self.rows = np.asarray(rows, np.int32)

    @classmethod
    def of(cls, units: Iterable[Unit]) -> Plan:
        """The plan of these units, in order of their index."""
        values = [(unit.start, unit.first_row, unit.rows) for unit in units]
        start, first_row, rows = np.array(values, np.int64).reshape(-1, 3).T
        return cls(start=start, first_row=first_row, rows=rows)

    @property
    def total_rows(self) -> int:
        """Source rows of all units."""
        return int(self.rows.sum(dtype=np.int64))

    def rows_of(self, units: Iterable[int]) -> int:
        """Source rows of these units; numbers outside the plan count as 0."""
        inside = np.fromiter((unit for unit in units if unit < len(self)), np.int64)  # others may have any size
        return int(self.rows[inside].sum(dtype=np.int64))

    def __len__(self) -> int:
        return self.start.size

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | list[Unit]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return Unit(number, int(self.start[number]), int(self.first_row[number]), int(self.rows[number]))

    def __iter__(self) -> Iterator[Unit]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))


def plan_to_bytes(units: Sequence[Unit]) -> bytes:
    """The plan as a Parquet file; the row number is the unit's index."""
    plan = units if isinstance(units, Plan) else Plan.of(units)
    return table_to_bytes(pa.table({name: getattr(plan, name) for name in _SCHEMA.names}, schema=_SCHEMA))


def plan_from_bytes(data: bytes, *, where: str) -> Plan:
    """The plan in `data`. Raises `CommitDamaged`."""
    table = table_from_bytes(data, schema=_SCHEMA, max_rows=MAX_UNITS, where=where, error=CommitDamaged)
    columns = {name: table[name].to_numpy() for name in _SCHEMA.names}
    if any((column < 0).any() for column in columns.values()):
        raise CommitDamaged(where, found="a negative number", wanted="numbers from 0 on")
    return Plan(**columns)
