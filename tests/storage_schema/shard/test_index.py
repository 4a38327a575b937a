"""Laws of `ShardIndex`: its frames are the columns' bytes, its bytes read back or not at all."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from coldstill.storage_schema.codec import STREAMS
from coldstill.storage_schema.errors import ShardDamaged
from coldstill.storage_schema.shard import ShardFile, ShardIndex, write_shard
from tests import making


@pytest.fixture(scope="module")
def shard(tokenizer_folder) -> bytes:
    """Of 1,100 rows: two row groups, and several pages in a column."""
    rng = np.random.default_rng(0)
    rows = [making.random_row(rng, f"row-{number}") for number in range(1100)]
    return write_shard(rows, header=making.tiny_header(tokenizer_folder))


def opened(data: bytes) -> ShardFile:
    return ShardFile(pa.BufferReader(data), size=len(data), codec=None, where="here")


def test_every_frame_lies_where_the_index_has_it(shard, tmp_path):
    (tmp_path / "shard").write_bytes(shard)
    file = opened(shard)
    index = ShardIndex.of(file)
    assert len(index.group_rows) > 1
    row = 0
    with (tmp_path / "shard").open("rb") as source:
        for group in range(len(index.group_rows)):
            batch = file.batch(group)
            places = index.rows_of(group)
            frames = index.read_frames(source.fileno(), range(places.start, places.stop), where="here")
            for number, found in enumerate(frames):
                assert {name: bytes(frame) for name, frame in found.items()} == {
                    name: batch.column(name)[number].as_py() for name in STREAMS
                }
                assert index.lengths[row] == len(batch.column("token_ids")[number])
                row += 1
    assert row == 1100


def test_an_index_reads_back_and_a_torn_one_does_not(shard):
    index = ShardIndex.of(opened(shard))
    data = index.to_bytes()
    again = ShardIndex.from_bytes(data, rows=1100)
    assert again is not None
    assert all(np.array_equal(one, other) for one, other in zip(index, again, strict=True))
    assert ShardIndex.from_bytes(data, rows=1099) is None
    for broken in (b"", data[:10], data[:-1], data + b"0", bytes(len(data)), data[:50] + b"x" + data[51:]):
        assert ShardIndex.from_bytes(broken, rows=1100) is None


def test_the_index_of_a_shard_without_rows_is_empty(tokenizer_folder):
    data = write_shard([], header=making.tiny_header(tokenizer_folder))
    index = ShardIndex.of(opened(data))
    assert (index.group_rows.size, index.lengths.size) == (0, 0)
    assert ShardIndex.from_bytes(index.to_bytes(), rows=0) is not None


def test_a_frame_of_a_cut_file_is_a_named_error(shard, tmp_path):
    (tmp_path / "shard").write_bytes(shard[: len(shard) // 2])
    index = ShardIndex.of(opened(shard))
    with (tmp_path / "shard").open("rb") as source, pytest.raises(ShardDamaged, match="here"):
        index.read_frames(source.fileno(), [1099], where="here")
