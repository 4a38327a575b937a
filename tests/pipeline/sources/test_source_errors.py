"""Sources that cannot be read are named with the way out, and a broken line is told apart."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.local import LocalFileSystem

from coldstill.pipeline.errors import SourceEmpty, SourceNotFound, SourceUnreadable, TooManyUnits
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources import json_lines
from coldstill.pipeline.sources import source as source_module
from coldstill.pipeline.sources.source import open_source
from coldstill.storage_schema.errors import StorageFailed
from coldstill.storage_schema.store import Store
from tests.pipeline.sources.source_files import (
    as_lines,
    dataset_folder,
    one_file,
)

BROKEN_LINES = {
    b"nonsense": "not JSON",
    b"[1]": "list",
    b'{"text": "\xff"}': "utf-8",
    b'"' + b"[" * 10: "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": "\\ud800"}': "surrogates",
    b'{"a": ' + b"9" * 5000 + b"}": "digits",
}


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_line_that_is_no_object_is_told_apart_not_dropped(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    data = b"\n".join([b'{"a": 1}', *BROKEN_LINES, b'{"a": 2}'])
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    source = open_source(SourceConfig(path=str(path)), Store(tmp_path / "dataset"))
    rows = list(source.read(source.plan(10)[0]))
    assert [row.columns for row in rows] == [{"a": 1}, *[None] * len(BROKEN_LINES), {"a": 2}]
    for row, problem in zip(rows[1:-1], BROKEN_LINES.values(), strict=True):
        assert problem in row.problem


@pytest.mark.parametrize("is_wide", [False, True])
def test_a_value_of_parquet_that_python_cannot_hold_costs_no_more_than_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_wide: bool
) -> None:
    """Arrow reads text that is not UTF-8 and times after the year 9999 without an error."""
    if is_wide:
        monkeypatch.setattr("coldstill.pipeline.sources.parquet_rows._WIDE_BYTES", 0)
    texts = [b"a", b"b \xff", b"c", b"d", b"e"]
    table = pa.table(
        {
            "text": pa.Array.from_buffers(pa.string(), 5, pa.array(texts, pa.binary()).buffers()),
            "time": pa.array([0, 0, 1 << 62, 0, None], pa.timestamp("us")),
            "times": pa.array([[0], [0], [0], [1 << 62], [0]], pa.list_(pa.timestamp("us"))),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(SourceConfig(path=str(tmp_path / "x.parquet")), Store(tmp_path / "dataset"))
    plan = source.plan(2)
    rows = [row for unit in plan for row in source.read(unit)]
    assert [row.number for row in rows] == list(range(5))
    assert [row.columns and row.columns["text"] for row in rows] == ["a", None, "c", None, "e"]
    assert [row.reason for row in rows if row.columns is None] == ["not_utf8", "not_json"]
    assert rows[2].columns is not None
    assert str(1 << 62) in rows[2].columns["time"]
    assert [row.number for row in source.rows(only="text")] == list(range(5))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in ("absent.jsonl", "absent*.jsonl"):
        with pytest.raises(SourceNotFound, match="absent"):
            open_source(SourceConfig(path=str(tmp_path / path)))


def test_a_folder_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(SourceNotFound, match=r"x\.jsonl/\*\.jsonl"):
        open_source(SourceConfig(path=str(tmp_path / "x.jsonl")))


def test_a_missing_folder_is_not_taken_for_a_file_with_an_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="no such file"):
        open_source(SourceConfig(path=str(tmp_path / "absent")))


def test_an_unknown_ending_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a")
    for path in ("x.csv", "*"):
        with pytest.raises(SourceUnreadable, match="convert it"):
            open_source(SourceConfig(path=str(tmp_path / path)))


def test_lines_and_parquet_in_one_pattern_are_refused(tmp_path: Path) -> None:
    one_file("x.jsonl")(tmp_path), one_file("x.parquet")(tmp_path)
    with pytest.raises(SourceUnreadable, match="files of one format"):
        open_source(SourceConfig(path=str(tmp_path / "x.*")))


def test_an_address_that_fsspec_does_not_know_is_named() -> None:
    with pytest.raises(SourceUnreadable, match="nowhere"):
        open_source(SourceConfig(path="nowhere://x/y.jsonl"))


@pytest.mark.parametrize("text", ["", "\n\n"])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_an_empty_source_is_named(tmp_path: Path, ending: str, text: str) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    source = open_source(SourceConfig(path=str(path)))
    with pytest.raises(SourceEmpty, match="no rows"):
        source.head()
    with pytest.raises(SourceEmpty, match="no rows"):
        source.plan(4)


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SourceUnreadable, match=r"x\.parquet"):
        open_source(SourceConfig(path=str(path)))


LOST = [ConnectionResetError(104, "reset"), OSError(5, "Input/output error"), TimeoutError()]


@pytest.mark.parametrize("error", LOST)
@pytest.mark.parametrize("part", ["footer", "rows"])
def test_a_connection_that_is_lost_in_a_parquet_file_is_no_damage_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, part: str
) -> None:
    pq.write_table(pa.table({"text": [os.urandom(50).hex() for _ in range(3000)]}), tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    source = open_source(SourceConfig(path=str(tmp_path / "x.parquet")))

    class Cut(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if part == "footer" or self.tell() < len(data) // 2:
                raise error
            return super().read(size)

    monkeypatch.setattr(LocalFileSystem, "open", lambda *_, **__: Cut(data))
    with pytest.raises(StorageFailed, match="reading the source"):
        list(source.rows())


@pytest.mark.parametrize(("ending", "packed"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_damaged_compression_is_named_with_the_line_and_nothing_is_staged(
    tmp_path: Path, ending: str, packed: Callable[[bytes], bytes]
) -> None:
    whole = packed(as_lines([{"n": os.urandom(20).hex()} for _ in range(2000)]))
    store = Store(tmp_path / "dataset")
    for name, data in {"cut": whole[:-9], "none": b"this was never packed", "trailing": whole + b"rubbish"}.items():
        path = tmp_path / f"{name}.jsonl.{ending}"
        path.write_bytes(data)
        with pytest.raises(SourceUnreadable, match=rf"{name}\.jsonl\.{ending}: after line \d+"):
            open_source(SourceConfig(path=str(path)), store).plan(4)
        assert store.names("staging") == []


def test_a_line_without_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 1000)
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n' + b"x" * 5000)
    with pytest.raises(SourceUnreadable, match="line 2"):
        open_source(SourceConfig(path=str(tmp_path / "x.jsonl"))).plan(4)


def test_a_dataset_that_is_not_there_is_named(tmp_path: Path) -> None:
    for dataset, split in ((str(tmp_path / "absent"), "train"), (str(tmp_path), "train")):
        with pytest.raises(SourceNotFound, match=r"source\.dataset"):
            open_source(SourceConfig(dataset=dataset, split=split)).head()
    dataset_folder(tmp_path)
    with pytest.raises(SourceNotFound, match="validation"):
        open_source(SourceConfig(dataset=str(tmp_path), split="validation")).head()


def test_a_plan_of_too_many_units_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "MAX_UNITS", 5)
    source = open_source(one_file("x.jsonl")(tmp_path))
    with pytest.raises(TooManyUnits, match="rows_per_unit to 3"):
        source.plan(2)
    assert len(source.plan(3)) == 4
