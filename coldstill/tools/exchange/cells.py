"""Cells of other tools' columns: a record batch, a row and a column's name in, numpy arrays out, or why there are none.

Shape letters: `n` positions of a row. No number passes through Python.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from .errors import UnusableRow

MAX_ENTRIES = 1 << 27
"""Most entries of a row once all its positions are as wide as the widest: 1 GiB of float64."""


def values_of(table: pa.RecordBatch, row: int, name: str) -> np.ndarray | None:
    """The numbers of a list column in one row; `None` where there are none. Raises `UnusableRow` for other types."""
    if name not in table.schema.names or not table.column(name)[row].is_valid:
        return None
    column = _require_list(table.column(name), name)
    return numbers(column.slice(row, 1).flatten(), name)


def nested_of(table: pa.RecordBatch, row: int, name: str) -> tuple[pa.Array, np.ndarray] | None:
    """The entries of a list-of-lists column in one row, end to end, and how many each position has (`int64 [N]`, 0 for
    a null position). `None` where the row has none. Raises `UnusableRow` for other types."""
    if name not in table.schema.names or not table.column(name)[row].is_valid:
        return None
    outer = _require_list(table.column(name), name)
    inner = _require_list(outer.slice(row, 1).flatten(), name)
    lengths = inner.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return inner.flatten(), lengths


def check_size(name: str, *, positions: int, width: int) -> None:
    """Raise `UnusableRow` before arrays are made that no row of a dataset needs."""
    if positions * width > MAX_ENTRIES:
        raise UnusableRow(
            name, found=f"{positions} positions of {width} entries", wanted=f"at most {MAX_ENTRIES} entries"
        )


def numbers(values: pa.Array, name: str) -> np.ndarray:
    """The numbers of a flat array. Raises `UnusableRow` for nulls and other types."""
    kind = values.type
    if values.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        found = f"{values.null_count} nulls" if values.null_count else str(kind)
        raise UnusableRow(name, found=found, wanted="numbers")
    return values.to_numpy(zero_copy_only=False)


def text_of(table: pa.RecordBatch, row: int, name: str) -> str | None:
    """The value of a string or number column in one row; `None` where there is none."""
    value = table.column(name)[row].as_py() if name in table.schema.names else None
    return None if value is None else str(value)


def _require_list(values: pa.Array, name: str) -> pa.Array:
    if pa.types.is_fixed_size_list(values.type):
        values = values.cast(pa.list_(values.type.value_type))
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        raise UnusableRow(name, found=str(values.type), wanted="lists")
    return values
