"""Laws of the loader's work: what its processes read, hash and copy does not grow with their number."""

from __future__ import annotations

import multiprocessing
import threading
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from coldstill.storage_schema import verified_files
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.store import Store
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from tests import making

from .datasets import all_same, make_rows, names, write_grouped

SHARDS = 8
READERS = [(1, 0), (1, 4), (2, 4)]
"""Ranks, and loader workers of each."""


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def many(tmp_path_factory, tokenizer_folder):
    """96 rows in 8 shards of one row group each."""
    rows = make_rows(96)
    shards = [rows[start : start + 12] for start in range(0, 96, 12)]
    root = tmp_path_factory.mktemp("many") / "dataset"
    return write_grouped(
        root, shards, header=making.tiny_header(tokenizer_folder), tokenizer=tokenizer_folder, rows_of_group=12
    )


class Work:
    """Counts of this process and of those that it forks."""

    def __init__(self):
        # Not a lock of the threads of one process: the forked workers count too.
        self.hashed, self.groups = multiprocessing.Value("q", 0), multiprocessing.Value("q", 0)


def add(count, amount: int) -> None:
    with count.get_lock():
        count.value += amount


@pytest.fixture
def work(monkeypatch):
    """Bytes hashed, and row groups of which the frames were read, from here on."""
    counts = Work()
    digest, read = verified_files._digest, pq.ParquetFile.read_row_group

    def counted_digest(reading, wanted_bytes, **options):
        size, found = digest(reading, wanted_bytes, **options)
        add(counts.hashed, size)
        return size, found

    def counted_read(self, group, columns=None, **options):
        if columns is None:
            add(counts.groups, 1)
        return read(self, group, columns=columns, **options)

    monkeypatch.setattr(verified_files, "_digest", counted_digest)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted_read)
    return counts


def run_ranks(dataset, *, ranks: int, workers: int, **settings):
    """The batches of each rank; the ranks run at the same time, as those of a machine do."""
    loaders = [
        DataLoader(
            dataset.stream(batch_size=4, seed=3, epochs=1, rank=rank, world_size=ranks, **settings),
            batch_size=None,
            num_workers=workers,
        )
        for rank in range(ranks)
    ]
    shares = [[] for _ in loaders]
    running = [iter(loader) for loader in loaders]
    while any(batches is not None for batches in running):
        for rank, batches in enumerate(running):
            if batches is None:
                continue
            batch = next(batches, None)
            if batch is None:
                running[rank] = None
            else:
                shares[rank].append(batch)
    return shares


@pytest.mark.parametrize(
    ("ranks", "workers", "pack_length"), [*((*readers, 48) for readers in READERS), (*READERS[-1], None)]
)
def test_bytes_hashed_and_row_groups_read_do_not_grow_with_workers_and_ranks(
    many, tmp_path, work, ranks, workers, pack_length
):
    dataset = load_logit_dataset(many, cache_dir=tmp_path)
    shares = run_ranks(dataset, ranks=ranks, workers=workers, pack_length=pack_length)
    assert len({name for share in shares for name in names(share)}) == 96
    assert work.hashed.value == sum(shard.file.bytes for shard in dataset.sources.datasets[0].shards)
    assert work.groups.value == SHARDS


@pytest.mark.parametrize(("ranks", "workers"), READERS)
def test_each_frame_is_read_once_by_the_process_that_decodes_it(many, tmp_path, monkeypatch, ranks, workers):
    from coldstill.storage_schema.shard import ShardIndex

    frames, read = multiprocessing.Value("q", 0), ShardIndex.read_frames

    def counted(self, descriptor, rows, **options):
        found = read(self, descriptor, rows, **options)
        add(frames, sum(len(frame) for row in found for frame in row.values()))
        return found

    monkeypatch.setattr(ShardIndex, "read_frames", counted)
    dataset = load_logit_dataset(many, cache_dir=tmp_path)
    run_ranks(dataset, ranks=ranks, workers=workers, pack_length=48)
    shards = dataset.sources.datasets[0].shards
    cache = dataset.sources.cache
    stored = sum(int(cache.index(shard.file, rows=shard.rows).frames[..., 1].sum()) for shard in shards)
    assert frames.value == stored


def test_a_second_run_on_this_machine_hashes_nothing_and_reads_no_row_group_whole(many, tmp_path, work):
    first = names(load_logit_dataset(many, cache_dir=tmp_path).stream(batch_size=4, seed=0, epochs=1))
    assert min(work.hashed.value, work.groups.value) > 0
    work.hashed.value = work.groups.value = 0
    assert names(load_logit_dataset(many, cache_dir=tmp_path).stream(batch_size=4, seed=0, epochs=1)) == first
    assert (work.hashed.value, work.groups.value) == (0, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_folder_that_takes_no_file_costs_work_and_changes_no_batch(many, tmp_path, workers):
    (tmp_path / "file").write_bytes(b"")
    stream = load_logit_dataset(many, cache_dir=tmp_path / "file" / "cache").stream(batch_size=4, seed=3, epochs=1)
    wanted = list(load_logit_dataset(many, cache_dir=tmp_path / "cache").stream(batch_size=4, seed=3, epochs=1))
    assert all_same(list(DataLoader(stream, batch_size=None, num_workers=workers)), wanted)


def test_a_dataset_folder_that_takes_no_file_is_read_and_left_as_it_is(many, tmp_path):
    before = {path: path.stat() for path in sorted(Path(many).rglob("*"))}
    list(load_logit_dataset(many, cache_dir=tmp_path).stream(batch_size=4, seed=3, epochs=1))
    after = {path: path.stat() for path in sorted(Path(many).rglob("*"))}
    assert before.keys() == after.keys()
    assert all(before[path].st_mtime_ns == after[path].st_mtime_ns for path in before)


@contextmanager
def meeting(monkeypatch, parties: int):
    """Reads of shards wait until `parties` of them run at once."""
    barrier, opened = threading.Barrier(parties), Store.open
    waited = []

    def waiting(self, name):
        if name.startswith("shards/") and not self.is_local and len(waited) < parties:
            waited.append(name)
            barrier.wait(20)
        return opened(self, name)

    monkeypatch.setattr(Store, "open", waiting)
    yield waited


def test_shards_are_copied_at_the_same_time(many, tmp_path, monkeypatch):
    """Each read waits for three others: copies made one after another would never end."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{many}/", "/many/", recursive=True)
    try:
        with meeting(monkeypatch, 4) as waited:
            dataset = load_logit_dataset("memory://many", cache_dir=tmp_path)
            found = names(dataset.stream(batch_size=4, seed=0, epochs=1))
        assert len(set(waited)) == 4
        assert sorted(found) == sorted(row.sample_id for row in open_dataset(many).rows())
    finally:
        memory.rm("/many", recursive=True)
