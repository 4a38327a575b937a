"""The same rows as a source of each kind, for tests of sources."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from coldstill.pipeline.source_config import SourceConfig

ROWS = [{"id": f"r{i}", "text": "ü" * i} for i in range(11)]
BORDERS = [(0, 4), (4, 4), (4, 9), (9, 11)]
"""Of the files of a source of several; one of them is empty."""


def as_lines(rows: list[Any]) -> bytes:
    """Blank lines are no rows, and the last line may have no end."""
    return ("\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)).encode()


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def write_rows(path: Path, rows: list[Any]) -> None:
    if path.suffix == ".parquet":
        table = pa.Table.from_pylist(rows, schema=pa.schema({"id": pa.string(), "text": pa.string()}))
        pq.write_table(table, path, row_group_size=3)
        return
    packed: Callable[[bytes], bytes] = {".gz": gzipped, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(as_lines(rows)))


def one_file(name: str) -> Callable[[Path], SourceConfig]:
    def make(folder: Path) -> SourceConfig:
        write_rows(folder / name, ROWS)
        return SourceConfig(path=str(folder / name))

    return make


def many_files(pattern: str, *endings: str) -> Callable[[Path], SourceConfig]:
    def make(folder: Path) -> SourceConfig:
        for number, (start, stop) in enumerate(BORDERS):
            write_rows(folder / f"part {number}{endings[number % len(endings)]}", ROWS[start:stop])
        return SourceConfig(path=str(folder / pattern))

    return make


def dataset_folder(folder: Path) -> SourceConfig:
    for number, (start, stop) in enumerate([(0, 5), (5, 11)]):
        write_rows(folder / f"train-{number}.parquet", ROWS[start:stop])
    return SourceConfig(dataset=str(folder))


FORMATS: dict[str, Callable[[Path], SourceConfig]] = {
    "jsonl": one_file("a source.jsonl"),
    "gz": one_file("a source.jsonl.gz"),
    "zst": one_file("a source.json.zst"),
    "parquet": one_file("a source.parquet"),
    "many jsonl": many_files("part*.jsonl", ".jsonl"),
    "many parquet": many_files("**/*.parquet", ".parquet"),
    "many mixed lines": many_files("part*", ".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "datasets": dataset_folder,
}
STAGED = {"gz", "zst", "many mixed lines", "datasets"}
