"""The plan: which source rows each unit of work has. Made once, before any unit is given out, and never changed.

A unit is a fixed slice of the source, is one shard of the dataset, and is what is resumed. Units do not depend on how
many workers there are.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import CommitDamaged

PLAN_NAME = "plan.parquet"
_SCHEMA = pa.schema([("start", pa.int64()), ("first_row", pa.int64()), ("rows", pa.int32())])


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
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink, compression="zstd", store_schema=False)
    return sink.getvalue()


def plan_from_bytes(data: bytes, *, where: str) -> list[Unit]:
    """The units of a plan. Raises `CommitDamaged`."""
    try:
        table = pq.read_table(pa.BufferReader(data))
        columns = [table[name].to_pylist() for name in _SCHEMA.names]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise CommitDamaged(where, found=f"{type(error).__name__}: {error}", wanted="a plan in Parquet") from None
    units = [Unit(index, *values) for index, values in enumerate(zip(*columns, strict=True))]
    if any(
        not isinstance(value, int) or value < 0 for unit in units for value in (unit.start, unit.first_row, unit.rows)
    ):
        raise CommitDamaged(where, found="a missing or negative number", wanted="units of whole, non-negative numbers")
    return units
