"""Laws of a shard: it can be read alone, without our code, and tells when it is damaged or from elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage_schema.errors import ColdstillError, HeaderMismatch, InvalidRow, ShardDamaged, StreamDamaged
from storage_schema.header import DatasetHeader
from storage_schema.rows import CachedRow
from storage_schema.shard import ROWS_PER_GROUP, read_footer_header, read_shard, write_shard
from tests import making


@pytest.fixture(scope="module")
def header(tokenizer_folder: Path) -> DatasetHeader:
    return making.tiny_header(tokenizer_folder)


@pytest.fixture(scope="module")
def rows() -> list[CachedRow]:
    rng = np.random.default_rng(0)
    return [making.random_row(rng, f"row ü {i}") for i in range(20)]


def test_a_shard_gives_back_its_rows_in_order(header: DatasetHeader, rows: list[CachedRow]) -> None:
    read = list(read_shard(write_shard(rows, header=header), header=header, where="x"))
    assert [row.sample_id for row in read] == [row.sample_id for row in rows]
    for mine, theirs in zip(rows, read, strict=True):
        theirs.check(token_count=header.token_count)
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(mine.target_spans, theirs.target_spans)
        np.testing.assert_array_equal(mine.targets.ids, theirs.targets.ids)
        assert mine.metadata == theirs.metadata


def test_equal_rows_give_equal_bytes(header: DatasetHeader, rows: list[CachedRow]) -> None:
    assert write_shard(rows, header=header) == write_shard(rows, header=header)


def test_a_shard_alone_can_be_read(header: DatasetHeader, rows: list[CachedRow]) -> None:
    assert read_footer_header(write_shard(rows, header=header), where="x") == header


def test_any_parquet_reader_sees_the_plain_columns(header: DatasetHeader, rows: list[CachedRow]) -> None:
    table = pq.read_table(io.BytesIO(write_shard(rows, header=header)))
    assert table["sample_id"].to_pylist() == [row.sample_id for row in rows]
    assert table["token_ids"].to_pylist() == [row.token_ids.tolist() for row in rows]
    assert table["target_spans"][0].as_py() == rows[0].target_spans.reshape(-1).tolist()


def test_a_shard_of_no_rows_is_a_shard(header: DatasetHeader) -> None:
    assert list(read_shard(write_shard([], header=header), header=header, where="x")) == []


def test_row_groups_are_small(header: DatasetHeader) -> None:
    row = making.random_row(np.random.default_rng(1), "a", length=4)
    file = pq.ParquetFile(io.BytesIO(write_shard([row] * (ROWS_PER_GROUP + 1), header=header)))
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [ROWS_PER_GROUP, 1]


def test_a_shard_of_another_dataset_is_refused(header: DatasetHeader, rows: list[CachedRow]) -> None:
    other = header.model_copy(update={"source_sha256": "1" * 64})
    with pytest.raises(HeaderMismatch, match="source_sha256"):
        list(read_shard(write_shard(rows, header=other), header=header, where="x"))


def test_a_row_that_breaks_a_law_is_not_written(header: DatasetHeader, rows: list[CachedRow]) -> None:
    short = CachedRow(
        sample_id="a", token_ids=rows[0].token_ids[:1], target_spans=rows[0].target_spans, targets=rows[0].targets
    )
    with pytest.raises(InvalidRow, match="token_ids"):
        write_shard([short], header=header)


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
def test_a_truncated_shard_is_refused(header: DatasetHeader, rows: list[CachedRow], kept: float) -> None:
    data = write_shard(rows, header=header)
    cut = data[: int(kept * len(data)) if isinstance(kept, float) else kept]
    with pytest.raises(ShardDamaged, match="x"):
        list(read_shard(cut, header=header, where="x"))


def test_parquet_of_someone_else_is_refused(header: DatasetHeader) -> None:
    import pyarrow as pa

    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), sink)
    with pytest.raises(ShardDamaged, match="no header"):
        list(read_shard(sink.getvalue(), header=header, where="x"))


def test_every_flipped_byte_of_a_page_is_noticed_by_name(header: DatasetHeader, rows: list[CachedRow]) -> None:
    data = bytearray(write_shard(rows, header=header))
    rng = np.random.default_rng(0)
    for position in rng.integers(4, len(data) - 4, 60):
        damaged = bytearray(data)
        damaged[position] ^= 0x5A
        try:
            read = list(read_shard(bytes(damaged), header=header, where="x"))
        except ColdstillError:
            continue
        assert [row.sample_id for row in read] == [row.sample_id for row in rows]  # a byte that no reader looks at


def test_a_damaged_frame_names_file_row_and_stream(header: DatasetHeader, rows: list[CachedRow]) -> None:
    table = pq.read_table(io.BytesIO(write_shard(rows, header=header)))
    column = table.column_names.index("log_tail")
    frames = [*table["log_tail"].to_pylist()[:-1], b"not a frame"]
    damaged = table.set_column(column, "log_tail", [frames])
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, damaged.schema, store_schema=False) as writer:
        writer.write_table(damaged)
        writer.add_key_value_metadata({"coldstill": header.to_bytes()})
    with pytest.raises(StreamDamaged, match=r"x, row 19 \('row ü 19'\): stream log_tail"):
        list(read_shard(sink.getvalue(), header=header, where="x"))
