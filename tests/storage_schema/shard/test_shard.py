"""Laws of a shard: it can be read alone and without our code, and damage or another dataset's shard is an error."""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.codec import MAX_ENTRIES
from coldstill.storage_schema.errors import HeaderMismatch, InvalidRow, ShardDamaged, StreamDamaged
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import CachedRow, MediaReference, TeacherTargets
from coldstill.storage_schema.shard import SCHEMA, ShardFile, copy_shard, read_shard, write_shard
from coldstill.storage_schema.shard.layout import MAX_GROUP_BYTES, MAX_GROUP_ROWS, MAX_METADATA_DEPTH, is_too_deep
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
        np.testing.assert_array_equal(np.sort(mine.targets.ids), np.sort(theirs.targets.ids))
        assert mine.metadata == theirs.metadata


def test_equal_rows_give_equal_bytes(header: DatasetHeader, rows: list[CachedRow]) -> None:
    assert write_shard(rows, header=header) == write_shard(rows, header=header)


def test_a_shard_alone_can_be_read(header: DatasetHeader, rows: list[CachedRow]) -> None:
    file = _open(write_shard(rows, header=header))
    assert file.header == header
    assert [row.sample_id for row in file.rows()] == [row.sample_id for row in rows]


def test_any_parquet_reader_sees_the_plain_columns(header: DatasetHeader, rows: list[CachedRow]) -> None:
    table = pq.read_table(io.BytesIO(write_shard(rows, header=header)))
    assert table["sample_id"].to_pylist() == [row.sample_id for row in rows]
    assert table["token_ids"].to_pylist() == [row.token_ids.tolist() for row in rows]
    assert table["target_spans"][0].as_py() == rows[0].target_spans.reshape(-1).tolist()


def test_a_shard_of_no_rows_is_a_shard(header: DatasetHeader) -> None:
    assert list(read_shard(write_shard([], header=header), header=header, where="x")) == []


def test_row_groups_are_small(header: DatasetHeader) -> None:
    row = making.random_row(np.random.default_rng(1), "a", length=4)
    assert _open(write_shard([row] * (MAX_GROUP_ROWS + 1), header=header)).group_rows == (MAX_GROUP_ROWS, 1)
    large = replace(row, metadata={"text": "x" * (MAX_GROUP_BYTES // 9)})
    assert max(_open(write_shard([large] * 20, header=header)).group_rows) == 8


@pytest.mark.parametrize("entries", ["kept ids", "draws"])
def test_a_row_that_no_reader_would_take_is_not_written(tokenizer_folder: Path, entries: str) -> None:
    header = making.tiny_header(
        tokenizer_folder, top_k=4096, draws=1024, token_count=5200, vocab_size=5200, max_length=1 << 15
    )

    def row(positions: int) -> CachedRow:
        width, draws = (4096, 0) if entries == "kept ids" else (1, 1024)
        targets = TeacherTargets(
            ids=np.broadcast_to(np.arange(width, dtype=np.int32), (positions, width)),
            logprobs=np.broadcast_to(np.float32(-np.log(5200)), (positions, width)),
            counts=np.full(positions, width, np.int32),
            log_tail=np.full(positions, np.log1p(-width / 5200), np.float32),
            label_logprob=np.full(positions, -np.log(5200), np.float32),
            draw_ids=np.full(positions * draws, 5000, np.int32),
            draw_counts=np.full(positions, draws, np.int32),
        )
        token_ids, spans = np.zeros(positions + 1, np.int32), np.array([[0, positions]], np.int32)
        return CachedRow(sample_id="a", token_ids=token_ids, target_spans=spans, targets=targets)

    header = header if entries == "kept ids" else header.model_copy(update={"top_k": 1})
    most = MAX_ENTRIES // (4096 if entries == "kept ids" else 1024)
    with pytest.raises(InvalidRow, match="16,777,216"):
        write_shard([row(most + 1)], header=header)
    (read,) = read_shard(write_shard([row(most)], header=header), header=header, where="x")
    assert read.targets.positions == most


def test_a_row_is_read_without_its_neighbors(header: DatasetHeader, rows: list[CachedRow]) -> None:
    """The neighbors' frames are invalid, and are not read."""
    file = _open(write_shard(rows, header=header))
    batch = file.batch(0)
    column = batch.column("ids").to_pylist()
    spoilt = [frame if index == 7 else b"rubbish" for index, frame in enumerate(column)]
    batch = batch.set_column(batch.schema.get_field_index("ids"), SCHEMA.field("ids"), pa.array(spoilt, pa.binary()))
    spoilt_file = _open(copy_shard([batch], header=header))
    assert spoilt_file.row(7).sample_id == rows[7].sample_id
    with pytest.raises(StreamDamaged, match="row 8: stream ids"):
        spoilt_file.row(8)
    with pytest.raises(IndexError):
        spoilt_file.row(20)


def test_a_copy_without_decoding_gives_the_same_rows(header: DatasetHeader, rows: list[CachedRow]) -> None:
    data = write_shard(rows, header=header)
    assert copy_shard([_open(data).batch(0)], header=header) == data


def test_media_come_back(header: DatasetHeader, rows: list[CachedRow]) -> None:
    content = b"a picture"
    digest = hashlib.sha256(content).hexdigest()
    media = (
        MediaReference(position=0, type="image/png", sha256=digest, data=content),
        MediaReference(position=2, type="image/jpeg", sha256=digest, path="media/cat.jpg"),
    )
    with_media = replace(rows[0], media=media)
    read = list(read_shard(write_shard([with_media, rows[1]], header=header), header=header, where="x"))
    assert [row.media for row in read] == [media, ()]


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
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), sink)
    with pytest.raises(ShardDamaged, match="columns"):
        list(read_shard(sink.getvalue(), header=header, where="x"))


def test_every_flipped_byte_of_a_page_is_noticed_by_name(header: DatasetHeader, rows: list[CachedRow]) -> None:
    data = bytearray(write_shard(rows, header=header))
    rng = np.random.default_rng(0)
    for position in rng.integers(4, len(data) - 4, 200):
        damaged = bytearray(data)
        damaged[position] ^= 0x5A
        try:
            read = list(read_shard(bytes(damaged), header=header, where="x"))
        except ColdstillError:
            continue
        assert [row.sample_id for row in read] == [row.sample_id for row in rows]  # a byte that no reader looks at


def test_a_damaged_frame_names_file_row_and_stream(header: DatasetHeader, rows: list[CachedRow]) -> None:
    batch = _open(write_shard(rows, header=header)).batch(0)
    frames = [*batch.column("log_tail").to_pylist()[:-1], b"not a frame"]
    column = batch.schema.get_field_index("log_tail")
    damaged = batch.set_column(column, SCHEMA.field("log_tail"), pa.array(frames, pa.binary()))
    with pytest.raises(StreamDamaged, match="x, row 19: stream log_tail"):
        list(read_shard(copy_shard([damaged], header=header), header=header, where="x"))


def test_a_row_beyond_the_header_s_promises_is_not_written(header: DatasetHeader, rows: list[CachedRow]) -> None:
    for field, changes in (("tokens", {"max_length": 3}), ("draw_counts", {"kept_draws": 0})):
        with pytest.raises(InvalidRow, match=field):
            write_shard(rows, header=header.model_copy(update=changes))
    with pytest.raises(InvalidRow, match="top_k"):
        write_shard(rows, header=header.model_copy(update={"top_k": 5}))
    with pytest.raises(InvalidRow, match="draw_logprobs"):
        write_shard(rows, header=header.model_copy(update={"draw_logprobs": True}))


def test_metadata_that_are_too_long_are_not_written(header: DatasetHeader, rows: list[CachedRow]) -> None:
    with pytest.raises(InvalidRow, match="metadata"):
        write_shard([replace(rows[0], metadata={"text": "x" * (1 << 20)})], header=header)


def _open(data: bytes) -> ShardFile:
    return ShardFile(pa.BufferReader(data), size=len(data), codec=None, where="x")


@pytest.mark.parametrize(("depth", "is_allowed"), [(MAX_METADATA_DEPTH, True), (MAX_METADATA_DEPTH + 1, False)])
@pytest.mark.parametrize("open_and_close", ["[]", "{}", '["[", ]'])
def test_metadata_has_one_bound_of_depth_on_every_python(depth: int, is_allowed: bool, open_and_close: str) -> None:
    """The parsers of Python 3.12 and 3.13 give up at different depths."""
    opening, closing = open_and_close[:-1], open_and_close[-1]
    assert is_too_deep((opening * depth + closing * depth).encode()) is not is_allowed


def test_brackets_in_strings_and_beside_each_other_are_not_depth() -> None:
    many = MAX_METADATA_DEPTH + 1
    assert not is_too_deep(('{"a": "' + "[" * many + '\\"' + "{" * many + '"}').encode())
    assert not is_too_deep(("[" + "[]," * many + "{}]").encode())


def test_metadata_are_stored_as_json_which_has_no_nan(header: DatasetHeader) -> None:
    """Other readers of Parquet and JSON would refuse the row."""
    metadata = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "NaN": "Infinity"}
    row = replace(making.random_row(np.random.default_rng(0), "nan"), metadata=metadata)
    data = write_shard([row], header=header)
    (text,) = pq.read_table(pa.BufferReader(data), columns=["metadata"])["metadata"].to_pylist()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, None, 1.5], "NaN": "Infinity"}


def test_metadata_that_is_too_deep_is_not_written(header: DatasetHeader) -> None:
    row = making.random_row(np.random.default_rng(0), "deep")
    deep: list[object] = []
    for _ in range(900):
        deep = [deep]
    assert write_shard([replace(row, metadata={"a": deep})], header=header)
    for _ in range(200):
        deep = [deep]
    with pytest.raises(InvalidRow, match=r"1000 levels|recursion"):
        write_shard([replace(row, metadata={"a": deep})], header=header)
