"""The nouns of a source: a row, a file, and what reads rows by unit. What is named here is known by every reader."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from coldstill.common.models import FrozenModel
from coldstill.pipeline.errors import SourceChanged
from coldstill.storage_schema.plan import Unit

MAX_ROW_BYTES = 256 << 20
"""Of the JSON text of a row: what has no line end for so long is no file of lines."""


class SourceRow(NamedTuple):
    """Row number `number` of the source: its columns, or what is wrong with it."""

    number: int
    columns: dict[str, Any] | None
    problem: str = ""


class SourceFile(FrozenModel):
    """A file of the source as its store lists it."""

    name: str = Field(description="Local path or URL.")
    bytes: int | None = Field(description="None where the store does not say.")
    stamp: str = Field(description="What the store says changes with the content: ETag or time of the last change.")
    rows: int = Field(default=0, description="Known once the source was read.")


class Survey(NamedTuple):
    """What one pass over a source gives: the digest of its content, its rows, and where each unit starts (None: at the
    number of its first row); its files with their rows."""

    sha256: str
    rows: int
    starts: np.ndarray | None
    files: tuple[SourceFile, ...]


class Reader(ABC):
    """Files whose rows can be sought."""

    def __init__(self, files: Sequence[SourceFile]):
        self.files = tuple(files)

    @abstractmethod
    def rows(self) -> Iterator[SourceRow]:
        """All rows, from the first on, before there is a plan."""

    @abstractmethod
    def survey(self, rows_per_unit: int) -> Survey:
        """One pass over all content, with a bar. Raises `SourceUnreadable`."""

    @abstractmethod
    def read(self, unit: Unit) -> Iterator[SourceRow]:
        """The rows of one unit, of surveyed files. Raises `SourceChanged` where they are no longer there."""


def changed(name: str, *, unit: Unit, found: str, wanted: str) -> SourceChanged:
    """The error for a unit whose rows are not what was planned."""
    return SourceChanged(
        f"{name}: unit {unit.index}",
        found=found,
        wanted=f"{wanted}, as when the plan was made",
        fix="put the source back as it was, or capture into another output",
    )


def parsed(number: int, text: bytes) -> SourceRow:
    """The row that a JSON text holds, or what is wrong with it."""
    try:
        columns = json.loads(text)
        if b"\\u" in text:
            json.dumps(columns, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, and no text
    except (ValueError, RecursionError) as error:
        return SourceRow(number, None, f"not JSON: {error}")
    if not isinstance(columns, dict):
        return SourceRow(number, None, f"not a JSON object but {type(columns).__name__}")
    return SourceRow(number, columns)


def without_nulls(value: Any) -> Any:
    """A value of a typed column without the fields that only other rows have: Arrow fills them with nulls."""
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
