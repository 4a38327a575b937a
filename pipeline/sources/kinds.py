"""What kind of source files are, by their names' endings. Files in, what reads them out."""

from __future__ import annotations

from collections.abc import Sequence

from coldstill.pipeline.errors import SourceUnreadable

from .lines import JsonLines
from .parquet_rows import ParquetRows
from .rows import Reader, SourceFile
from .streams import COMPRESSIONS, CompressedLines, Stream, WideParquet

_LINES = ("jsonl", "json", "ndjson")


def kind_of(name: str) -> str:
    """`lines`, `compressed` or `parquet`, by the ending. Raises `SourceUnreadable`."""
    stem, _, ending = name.rpartition(".")
    compression = f".{ending}" in COMPRESSIONS
    ending = stem.rpartition(".")[2] if compression else ending
    if ending in _LINES:
        return "compressed" if compression else "lines"
    if ending == "parquet" and not compression:
        return "parquet"
    raise SourceUnreadable(
        name,
        found="an unknown ending",
        wanted=".jsonl or .json, also with .gz or .zst, or .parquet",
        fix="convert it to JSON lines or Parquet; datasets can write both: `to_json`, `to_parquet`",
    )


def origin_of(files: Sequence[SourceFile]) -> Reader | Stream:
    """What reads these files, as they are: rows that can be sought, or a stream. Raises `SourceUnreadable`."""
    kinds = {kind_of(file.name): file.name for file in files}
    if "parquet" in kinds and len(kinds) > 1:
        found, wanted = "JSON lines and Parquet in one source", "one kind"
        raise SourceUnreadable(", ".join(kinds.values()), found=found, wanted=wanted, fix="narrow source.path")
    # A store that does not say how large a file is cannot seek in it.
    if "compressed" in kinds or ("lines" in kinds and any(file.bytes is None for file in files)):
        return CompressedLines(files)
    reader = reader_of(files)
    return WideParquet(files) if isinstance(reader, ParquetRows) and reader.is_wide() else reader


def reader_of(files: Sequence[SourceFile]) -> Reader:
    """What seeks in these files, of which it is known that it can."""
    return ParquetRows(files) if kind_of(files[0].name) == "parquet" else JsonLines(files)
