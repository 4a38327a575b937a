"""Laws of sources: units cover the source once, in order, and each is read alone."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceChanged, SourceEmpty, SourceNotFound, SourceUnreadable
from pipeline.sources.readers import Source, open_source
from storage_schema.plan import Unit

ROWS = [{"id": f"r{i}", "text": "ü" * i} for i in range(11)]


@pytest.fixture(params=["jsonl", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    path = tmp_path / f"a source.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
    else:
        path.write_text("\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    return open_source(str(path))


@pytest.mark.parametrize("rows_per_unit", [1, 2, 4, 11, 100])
def test_units_cover_the_source_once_in_order(source: Source, rows_per_unit: int) -> None:
    units = source.plan(rows_per_unit)
    assert [unit.index for unit in units] == list(range(len(units)))
    read = [row for unit in units for row in source.read(unit)]
    assert [row.columns for row in read] == ROWS
    assert [row.number for row in read] == list(range(11))


def test_a_unit_is_read_without_the_others(source: Source) -> None:
    unit = source.plan(4)[1]
    assert [row.columns for row in source.read(unit)] == ROWS[4:8]


def test_the_first_row_needs_no_plan(source: Source) -> None:
    assert source.first().columns == ROWS[0]


def test_the_digest_is_of_the_content(source: Source, tmp_path: Path) -> None:
    copy = tmp_path / f"copy{Path(source.path).suffix}"
    copy.write_bytes(Path(source.path).read_bytes())
    assert open_source(str(copy)).sha256() == source.sha256()


def test_a_source_that_lost_rows_is_named(source: Source) -> None:
    last = source.plan(4)[-1]
    with pytest.raises(SourceChanged, match="unit 2"):
        list(source.read(Unit(last.index, last.start, last.first_row, last.rows + 1)))


def test_a_line_that_is_no_object_is_told_apart_not_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\nnonsense\n[1]\n')
    source = open_source(str(path))
    rows = list(source.read(source.plan(10)[0]))
    assert [row.columns for row in rows] == [{"a": 1}, None, None]
    assert "not JSON" in rows[1].problem
    assert "list" in rows[2].problem


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"absent\.jsonl"):
        open_source(str(tmp_path / "absent.jsonl"))


def test_an_unknown_ending_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreadable, match="convert it"):
        open_source(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_source_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(SourceEmpty, match="no rows"):
        open_source(str(path)).plan(4)


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SourceUnreadable, match=r"x\.parquet"):
        open_source(str(path)).plan(4)
