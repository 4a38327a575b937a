"""The plan: which source rows each unit of work has. Made once, before any unit is given out, and never changed.

A unit is a fixed slice of the source, is one shard of the dataset, and is what is resumed. Units do not depend on how
many workers there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from .errors import CommitDamaged
from .parquet.fields import required
from .parquet.small_tables import table_from_bytes, table_to_bytes

PLAN_NAME = "plan.parquet"
MAX_UNITS = 1_000_000
_SCHEMA = pa.schema(
    [
        required("start", pa.int64()),
        required("first_row", pa.int64()),
        required("rows", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Unit:
    """Unit number `index`: `rows` source rows from row `first_row` on, which stand at `start` in the source
    (a byte offset for line files, a row number elsewhere)."""

    index: int
    start: int
    first_row: int
    rows: int


def plan_to_bytes(units: list[Unit]) -> bytes:
    """The plan as a Parquet file; the row number is the unit's index."""
    columns = {name: [getattr(unit, name) for unit in units] for name in _SCHEMA.names}
    return table_to_bytes(pa.table(columns, schema=_SCHEMA))


def plan_from_bytes(data: bytes, *, where: str) -> list[Unit]:
    """The units of a plan. Raises `CommitDamaged`."""
    table = table_from_bytes(data, schema=_SCHEMA, max_rows=MAX_UNITS, where=where, error=CommitDamaged)
    columns = [table[name].to_pylist() for name in _SCHEMA.names]
    if any(min(column, default=0) < 0 for column in columns):
        raise CommitDamaged(where, found="a negative number", wanted="units of non-negative numbers")
    return [Unit(index, *values) for index, values in enumerate(zip(*columns, strict=True))]
