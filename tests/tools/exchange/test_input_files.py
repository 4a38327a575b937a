"""Other tools' files as one table: their order, reading from any row, and what is rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldstill.tools.errors import SourceUnreadable, UnusableRow
from coldstill.tools.exchange import input_files as input_files_module
from coldstill.tools.exchange.distillkit_import import import_distillkit
from coldstill.tools.exchange.importing import import_rows
from coldstill.tools.exchange.input_files import (
    JsonTables,
    ParquetTables,
    check_size,
    input_files,
    nested_of,
    source_digest,
    values_of,
)
from coldstill.tools.exchange.settings import DistillKitSettings
from tests import making
from tests.tools.exchange import peers


def test_files_of_a_folder_come_in_natural_order(tmp_path: Path) -> None:
    read = ("²1.parquet", "².parquet", "data_10.parquet", "data_2.parquet", "b/data_1.parquet")
    for name in (*read, ".hidden.parquet", "_x.parquet", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [file.name for file in input_files(tmp_path, endings=(".parquet",))]
    assert found == ["b/data_1.parquet", "data_2.parquet", "data_10.parquet", "²1.parquet", "².parquet"]


def test_kinds_of_files_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(SourceUnreadable, match="of formats"):
        input_files(tmp_path, endings=(".parquet", ".jsonl"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_from_any_number_on_are_the_rest_of_all_rows(kind: str, tmp_path: Path) -> None:
    sizes = [5, 0, 21, 1]
    first = 0
    for file, size in enumerate(sizes):
        rows = [{"n": number} for number in range(first, first + size)]
        first += size
        if kind == "jsonl":
            peers.write_jsonl(tmp_path / f"{file}.jsonl", rows)
        else:
            table = pa.Table.from_pylist(rows, schema=pa.schema([("n", pa.int64())]))
            pq.write_table(table, tmp_path / f"{file}.parquet", row_group_size=10)
    found = input_files(tmp_path, endings=(".parquet", ".jsonl"))
    tables = (
        ParquetTables(found)
        if kind == "parquet"
        else JsonTables(found, to_table=lambda document: pa.RecordBatch.from_pylist([document]))
    )
    assert len(tables) == 27
    for start in range(28):
        rows = [number for batch in tables.batches(start, columns=("n",)) for number in batch.table["n"].to_pylist()]
        assert rows == list(range(start, 27))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.parquet").touch()
    with pytest.raises(SourceUnreadable, match="two files"):
        input_files([tmp_path / "a" / "x.parquet", tmp_path / "b" / "x.parquet"], endings=(".parquet",))


@pytest.mark.parametrize("make", [pa.list_, pa.large_list, lambda inner: pa.list_(inner, 2)])
def test_every_kind_of_list_is_read(make: Callable[[pa.DataType], pa.DataType]) -> None:
    table = pa.RecordBatch.from_pydict(
        {
            "flat": pa.array([[9, 9], [1, 2]], make(pa.int64())),
            "deep": pa.array([[[9, 9], [9, 9]], [[1, 2], [3, 4]]], make(make(pa.int64()))),
        }
    )
    assert values_of(table, 1, "flat").tolist() == [1, 2]
    entries, lengths = nested_of(table, 1, "deep")
    assert (entries.to_pylist(), lengths.tolist()) == ([1, 2, 3, 4], [2, 2])


def test_columns_of_other_types_are_named() -> None:
    table = pa.RecordBatch.from_pydict({"n": [1], "text": [["a"]], "gap": [[1, None]], "none": [None]})
    for name, words in (("n", "lists"), ("text", "numbers"), ("gap", "1 nulls")):
        with pytest.raises(UnusableRow, match=words):
            values_of(table, 0, name)
    with pytest.raises(UnusableRow, match="lists"):
        nested_of(table, 0, "gap")
    assert values_of(table, 0, "none") is None
    assert nested_of(table, 0, "absent") is None


def test_a_row_group_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(1000)}), tmp_path / "a.parquet")
    tables = ParquetTables(input_files(tmp_path, endings=(".parquet",)))
    assert max(batch.table.num_rows for batch in tables.batches(0, columns=("n",))) <= input_files_module.ROWS_PER_BATCH


def test_a_file_without_the_columns_of_the_first_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "m": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "b.parquet")
    tables = ParquetTables(input_files(tmp_path, endings=(".parquet",)))
    with pytest.raises(SourceUnreadable, match=r"b\.parquet"):
        list(tables.batches(0, columns=("n", "m")))


def test_damaged_pages_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": list(range(5000))}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[60:200] = bytes(140)
    path.write_bytes(data)
    tables = ParquetTables(input_files(tmp_path, endings=(".parquet",)))
    with pytest.raises(SourceUnreadable, match="whole Parquet"):
        list(tables.batches(0, columns=("n",)))


def _with_footer(path: Path, change: Callable[[bytes], bytes]) -> None:
    """The file at `path` with a changed footer."""
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = change(data[start:-8])
    path.write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def _number(value: int) -> bytes:
    """A number of Thrift's compact protocol."""
    value, found = value << 1, b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


FOOTERS: dict[str, Callable[[bytes], bytes]] = {
    "a list of a million columns": lambda footer: footer.replace(b"\x19\x1c\x19\x1c", b"\x19\x1c\x19\xfc\xbf\x84\x3d"),
    "other rows in its groups": lambda footer: footer.replace(b"\x16" + _number(999), b"\x16" + _number(7), 1),
    "fewer values than rows": lambda footer: footer.replace(b"\x16" + _number(2997), b"\x16" + _number(3)),
    "a gigabyte": lambda footer: footer + bytes(17 << 20),
}


@pytest.mark.parametrize("change", FOOTERS.values(), ids=FOOTERS.keys())
def test_a_footer_is_checked_before_arrow_takes_memory_for_it(
    tmp_path: Path, change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [[1, 2, 3]] * 999}), path, compression="gzip")
    files = input_files(path, endings=(".parquet",))
    assert len(ParquetTables(files)) == 999
    before = path.read_bytes()
    _with_footer(path, change)
    assert path.read_bytes() != before
    monkeypatch.setattr(pq, "ParquetFile", lambda *values, **options: pytest.fail("Arrow read it"))
    with pytest.raises(SourceUnreadable, match=r"(?s)a\.parquet.*whole Parquet"):
        ParquetTables(files)


def test_a_file_that_claims_more_rows_than_a_dataset_has_ends_before_they_are_planned(
    tmp_path: Path, wide_tokenizer: Path
) -> None:
    class Claimed:
        def __len__(self) -> int:
            return 1 << 50

    header = making.tiny_header(wide_tokenizer)
    with pytest.raises(SourceUnreadable, match="rows-per-unit"):
        import_rows(Claimed(), tmp_path / "dataset", header=header, tokenizer=wide_tokenizer)  # type: ignore[arg-type]
    assert not (tmp_path / "dataset").exists()


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_files_module, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n' + " " * 200)
    with pytest.raises(SourceUnreadable, match="byte 9"):
        JsonTables(input_files(tmp_path, endings=(".jsonl",)), to_table=lambda document: pa.RecordBatch.from_pylist([]))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_than_utf8_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"n": 1}\n{"n": 2}\n'.encode(encoding))
    with pytest.raises(SourceUnreadable, match=r"(?s)UTF-16.*iconv.*a\.jsonl"):
        JsonTables(input_files(tmp_path, endings=(".jsonl",)), to_table=lambda document: pa.RecordBatch.from_pylist([]))


def test_no_array_is_made_that_no_row_needs() -> None:
    check_size("x", positions=1 << 20, width=128)
    with pytest.raises(UnusableRow, match="at most"):
        check_size("x", positions=(1 << 20) + 1, width=128)


def test_the_digest_is_of_names_content_and_settings(tmp_path: Path) -> None:
    def digest(**settings: int) -> str:
        return source_digest(input_files(tmp_path, endings=(".jsonl",)), settings=settings, progress=False)

    (tmp_path / "a.jsonl").write_text("1")
    seen = {digest(), digest(a=1), digest(a=2)}
    (tmp_path / "a.jsonl").write_text("2")
    seen.add(digest())
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    seen.add(digest())
    assert len(seen) == 5
    assert digest() == digest()


def test_a_capture_on_an_object_store_is_read_and_written_there(tmp_path: Path, wide_tokenizer: Path) -> None:
    rows = [peers.distillkit_row(one, peers.ALL_EXACT) for one in peers.sequences(3)]
    local = peers.write_distillkit(tmp_path / "capture", rows, peers.ALL_EXACT, per_file=2)
    memory = fsspec.filesystem("memory")
    memory.put(str(local), "/exchange-capture", recursive=True)
    settings = DistillKitSettings(tokenizer=wide_tokenizer, teacher="t")
    there = import_distillkit("memory://exchange-capture", "memory://exchange-out", settings, progress=False)
    here = import_distillkit(local, tmp_path / "out", settings, progress=False)
    assert there == here
    memory.rm("/exchange-capture", recursive=True)
    memory.rm("/exchange-out", recursive=True)
