"""Columns that hold no nulls, the only kind of a dataset."""

from __future__ import annotations

import pyarrow as pa


def required(name: str, kind: pa.DataType) -> pa.Field:
    """A column of `kind`."""
    return pa.field(name, kind, nullable=False)


def list_of(kind: pa.DataType) -> pa.DataType:
    """The type of a list, named as the Parquet format names its parts."""
    return pa.list_(required("element", kind))
