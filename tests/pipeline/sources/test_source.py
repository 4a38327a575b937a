"""Laws of sources: units cover the source once, in order, and each can be read separately, for every kind of source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldstill.pipeline.errors import SourceChanged, SourceNotFound, SourceUnreadable
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources import parquet_rows
from coldstill.pipeline.sources.source import Source, open_source
from coldstill.storage_schema.plan import Unit, plan_from_bytes, plan_to_bytes
from coldstill.storage_schema.store import Store
from tests.pipeline.sources.source_files import (
    BORDERS,
    FORMATS,
    ROWS,
    STAGED,
    as_lines,
    dataset_folder,
    many_files,
    one_file,
    write_rows,
)


@pytest.fixture(params=FORMATS)
def format_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(format_name: str, tmp_path: Path) -> SourceConfig:
    folder = tmp_path / "source"
    folder.mkdir()
    return FORMATS[format_name](folder)


@pytest.fixture(params=["with a store", "without"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store | None:
    return Store(tmp_path / "dataset") if request.param == "with a store" else None


def _read(source: Source, units: list[Unit]) -> list[Any]:
    return [row.columns for unit in units for row in source.read(unit)]


@pytest.mark.parametrize("rows_per_unit", [1, 2, 4, 11, 100])
def test_units_cover_the_source_once_in_order(config: SourceConfig, store: Store | None, rows_per_unit: int) -> None:
    source = open_source(config, store)
    units = list(source.plan(rows_per_unit))
    assert [unit.index for unit in units] == list(range(len(units)))
    read = [row for unit in units for row in source.read(unit)]
    assert [row.columns for row in read] == ROWS
    assert [row.number for row in read] == list(range(11))


def test_a_worker_reads_its_unit_alone_from_the_plan_and_the_store(
    config: SourceConfig, tmp_path: Path, format_name: str
) -> None:
    store = Store(tmp_path / "dataset")
    plan = plan_from_bytes(plan_to_bytes(open_source(config, store).plan(4)), where="plan")
    for index in (2, 0, 1):
        assert _read(open_source(config, store), [plan[index]]) == ROWS[4 * index : 4 * index + 4]
    assert (len(store.names("staging")) > 1) == (format_name in STAGED)


def test_a_staged_source_is_read_from_the_copy_alone(config: SourceConfig, tmp_path: Path, format_name: str) -> None:
    store = Store(tmp_path / "dataset")
    plan = open_source(config, store).plan(4)
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    if format_name in STAGED:
        assert _read(open_source(config, store), list(plan)) == ROWS
    else:
        with pytest.raises(SourceNotFound):
            _read(open_source(config, store), list(plan))


def test_the_first_rows_need_no_plan_and_write_nothing(config: SourceConfig, store: Store | None) -> None:
    assert [row.columns for row in open_source(config, store).head(5)] == ROWS[:5]
    assert store is None or not Path(store.url).exists()


def test_units_depend_on_the_source_alone(config: SourceConfig, tmp_path: Path) -> None:
    """Not on the store, nor on whether there is one, nor on what was staged before."""
    stores = [None, Store(tmp_path / "a"), Store("memory://b"), Store(tmp_path / "a")]
    sources = [open_source(config, store) for store in stores]
    plans = [plan_to_bytes(source.plan(4)) for source in sources]
    assert len(set(plans)) == 1
    assert len({source.fingerprint for source in sources}) == 1
    assert _read(sources[2], list(sources[2].plan(4))) == ROWS


def test_the_fingerprint_is_of_the_content_not_of_names_or_times(
    config: SourceConfig, format_name: str, tmp_path: Path
) -> None:
    copy = tmp_path / "another folder"
    copy.mkdir()
    other = FORMATS[format_name](copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    assert open_source(other).fingerprint == open_source(config).fingerprint


def test_a_fingerprint_is_known_again_without_reading_everything(
    config: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "dataset")
    first = open_source(config, store)
    first.plan(4)
    monkeypatch.setattr(Source, "_survey", lambda *_: pytest.fail("a second pass"))
    assert open_source(config, store).fingerprint == first.fingerprint


def test_a_touched_or_moved_source_is_the_same(config: SourceConfig, format_name: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "dataset")
    first = open_source(config, store)
    plan = first.plan(4)
    for path in (tmp_path / "source").iterdir():
        os.utime(path, (5, 5))
    assert open_source(config, store).fingerprint == first.fingerprint
    folder = (tmp_path / "source").rename(tmp_path / "moved")
    moved = FORMATS[format_name](folder)
    assert open_source(moved, store).fingerprint == first.fingerprint
    assert _read(open_source(moved, store), list(plan)) == ROWS


def test_a_changed_source_has_another_fingerprint(config: SourceConfig, format_name: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "dataset")
    first = open_source(config, store)
    first.plan(4)
    path = sorted((tmp_path / "source").iterdir())[0]
    write_rows(path, [{"id": "x", "text": "another"}])
    assert open_source(config, store).fingerprint != first.fingerprint


def test_other_columns_on_an_existing_dataset_are_named(config: SourceConfig, tmp_path: Path) -> None:
    store = Store(tmp_path / "dataset")
    open_source(config, store).plan(4)
    with pytest.raises(SourceChanged, match=r"source\.text"):
        _ = open_source(config.model_copy(update={"text": "id"}), store).fingerprint


def test_another_split_of_a_dataset_is_named(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    config = dataset_folder(tmp_path / "source")
    write_rows(tmp_path / "source" / "test-0.parquet", ROWS[:2])
    store = Store(tmp_path / "dataset")
    open_source(config, store).plan(4)
    with pytest.raises(SourceChanged, match=r"source\.split"):
        _ = open_source(config.model_copy(update={"split": "test"}), store).fingerprint
    assert [row.columns for row in open_source(config.model_copy(update={"split": "test"})).head(5)] == ROWS[:2]


def test_a_file_that_joins_the_pattern_later_is_a_change_and_no_worker_reads_it(tmp_path: Path) -> None:
    source = many_files("part*.jsonl", ".jsonl")(tmp_path)
    store = Store(tmp_path / "dataset")
    first = open_source(source, store)
    plan = first.plan(4)
    write_rows(tmp_path / "part 00.jsonl", ROWS[:3])
    assert open_source(source, store).fingerprint != first.fingerprint
    assert _read(open_source(source, store), list(plan)) == ROWS


def test_a_unit_reads_no_byte_of_the_rows_before_it(tmp_path: Path) -> None:
    config = one_file("x.jsonl")(tmp_path)
    source = open_source(config)
    unit = source.plan(4)[1]
    data = (tmp_path / "x.jsonl").read_bytes()
    (tmp_path / "x.jsonl").write_bytes(b"\xff" * (unit.start - 1) + data[unit.start - 1 :])
    assert _read(source, [unit]) == ROWS[4:8]


def test_of_a_parquet_file_only_the_row_groups_of_the_unit_are_read(tmp_path: Path) -> None:
    config = one_file("x.parquet")(tmp_path)
    source = open_source(config)
    unit = source.plan(3)[2]
    path = tmp_path / "x.parquet"
    group = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    path.write_bytes(data)
    assert _read(source, [unit]) == ROWS[6:9]
    with pytest.raises(SourceUnreadable, match=r"x\.parquet"):
        _read(source, [source.plan(3)[1]])


@pytest.mark.parametrize("format_name", ["jsonl", "parquet"])
def test_a_source_that_changes_under_a_worker_is_named(tmp_path: Path, format_name: str) -> None:
    config = one_file(f"x.{format_name}")(tmp_path)
    source = open_source(config)
    last = source.plan(4)[-1]
    with pytest.raises(SourceChanged, match="unit 2"):
        _read(source, [Unit(last.index, last.start, last.first_row, last.rows + 1)])
    write_rows(tmp_path / f"x.{format_name}", ROWS[:-2])
    with pytest.raises(SourceChanged, match="unit 2"):
        _read(source, [last])


def test_a_unit_that_would_start_inside_a_line_is_named(tmp_path: Path) -> None:
    source = open_source(one_file("x.jsonl")(tmp_path))
    unit = source.plan(4)[1]
    with pytest.raises(SourceChanged, match="no line that starts"):
        _read(source, [Unit(1, unit.start + 1, 4, 4)])


def test_a_remote_pattern_is_read_through_fsspec() -> None:
    fs = fsspec.filesystem("memory")
    for number, (start, stop) in enumerate(BORDERS):
        fs.pipe_file(f"/remote/part-{number}.jsonl", as_lines(ROWS[start:stop]))
    store = Store("memory://remote-dataset")
    plan = open_source(SourceConfig(path="memory://remote/part-*.jsonl"), store).plan(4)
    assert _read(open_source(SourceConfig(path="memory://remote/part-*.jsonl"), store), list(plan)) == ROWS


def test_parquet_in_huge_row_groups_is_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_file("x.parquet")(tmp_path)
    narrow = open_source(config).fingerprint
    monkeypatch.setattr(parquet_rows, "_WIDE_BYTES", 1)
    store = Store(tmp_path / "dataset")
    source = open_source(config, store)
    assert _read(source, list(source.plan(4))) == ROWS
    assert source.fingerprint == narrow
    assert len(store.names("staging")) == 2


def test_nulls_that_a_typed_column_adds_are_left_out(tmp_path: Path) -> None:
    rows = [{"m": [{"role": "user", "call": None}, {"role": "tool", "call": {"a": 1, "b": None}}], "note": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (row,) = open_source(SourceConfig(path=str(tmp_path / "x.parquet"))).head()
    assert row.columns == {"m": [{"role": "user"}, {"role": "tool", "call": {"a": 1}}], "note": None}
