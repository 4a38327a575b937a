"""Local copies of remote shards: complete and verified or absent, within the bound, shared by processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import ShardDamaged, ShardMissing, StorageFailed
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.data.shard_cache import ShardCache
from tests.pipeline.buckets import s3_bucket

from .datasets import all_same


@pytest.fixture
def remote(grouped):
    """The dataset in fsspec's memory file system, which counts as remote."""
    memory = fsspec.filesystem("memory")
    memory.put(f"{grouped}/", "/remote/", recursive=True)
    yield "memory://remote"
    memory.rm("/remote", recursive=True)


@pytest.fixture
def bucket(grouped, monkeypatch):
    """The dataset on an S3 server, and that server."""
    with s3_bucket(monkeypatch) as (address, server):
        fsspec.filesystem("s3").put(f"{grouped}/", f"{address}/d/", recursive=True)
        server.forget()
        yield f"{address}/d", server


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/shards/*"))


def test_a_copy_is_made_once_and_is_the_shard(remote, tmp_path):
    dataset = open_dataset(remote)
    cache = ShardCache(tmp_path, most_bytes=1 << 30)
    for shard in dataset.shards:
        copy = cache.path(dataset.store, shard.file)
        assert copy.read_bytes() == dataset.store.read(shard.file.name)
        dataset.store.delete(shard.file.name)
        assert cache.path(dataset.store, shard.file) == copy
    assert len(copies(tmp_path)) == len(dataset.shards)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_copies_stay_within_the_bound_and_the_least_recently_used_go(remote, tmp_path, shards):
    dataset = open_dataset(remote)
    files = [shard.file for shard in dataset.shards if shard.rows]
    most = sum(sorted((file.bytes for file in files), reverse=True)[:shards])
    cache = ShardCache(tmp_path, most_bytes=most)
    for number in range(12):
        file = files[number * 7 % len(files)]
        cache.path(dataset.store, file)
        assert sum(path.stat().st_size for path in copies(tmp_path)) <= most
        os.utime(cache.path(dataset.store, file), ns=(number, number))
    newest = {files[number * 7 % len(files)].name for number in (11, 10)[:shards]}
    assert newest <= {str(path.relative_to(path.parent.parent)) for path in copies(tmp_path)}


def test_a_shard_larger_than_the_bound_is_cached_alone(remote, tmp_path):
    dataset = open_dataset(remote)
    cache = ShardCache(tmp_path, most_bytes=1)
    for shard in dataset.shards:
        copy = cache.path(dataset.store, shard.file)
        assert copies(tmp_path) == [copy]


def test_partial_copies_of_a_killed_process_are_removed_and_a_cut_copy_is_replaced(remote, tmp_path):
    dataset = open_dataset(remote)
    cache = ShardCache(tmp_path, most_bytes=1 << 30)
    copy = cache.path(dataset.store, dataset.shards[0].file)
    part = copy.parent.parent / "_run" / "1-abc.part"
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(b"half")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-5])
    assert cache.path(dataset.store, dataset.shards[0].file).read_bytes() == whole
    assert not part.exists()


def test_a_damaged_remote_shard_is_a_named_error_and_is_not_kept(remote, tmp_path):
    dataset = open_dataset(remote)
    file = dataset.shards[0].file
    data = bytearray(dataset.store.read(file.name))
    data[len(data) // 2] ^= 1
    dataset.store.put(file.name, bytes(data))
    with pytest.raises(ShardDamaged, match=file.name):
        list(load_logit_dataset(remote, cache_dir=tmp_path).stream(batch_size=4, seed=0, epochs=1))
    assert file.sha256 not in {path.parent.parent.name for path in copies(tmp_path)}


def test_a_missing_remote_shard_is_named(remote, tmp_path):
    dataset = open_dataset(remote)
    dataset.store.delete(dataset.shards[0].file.name)
    with pytest.raises(ShardMissing, match=dataset.shards[0].file.name):
        list(load_logit_dataset(remote, cache_dir=tmp_path).stream(batch_size=4, seed=0, epochs=1))


def test_a_damaged_local_shard_is_a_named_error_when_opened(grouped, tmp_path):
    root = Path(shutil.copytree(grouped, tmp_path / "copy"))
    name = open_dataset(root).shards[2].file.name
    data = bytearray((root / name).read_bytes())
    data[-20] ^= 1  # of the footer's end: no page is damaged
    (root / name).write_bytes(bytes(data))
    run = load_logit_dataset(root).stream(batch_size=4, seed=0, epochs=1, shuffle=False)
    batches = iter(run)
    assert len(list(islice(batches, 5))) == 5  # those of the shard before it
    with pytest.raises(ShardDamaged, match=name):
        list(batches)


@pytest.mark.parametrize("most_bytes", [1, 1 << 30])
def test_a_remote_dataset_streams_like_its_local_copy(grouped, remote, tmp_path, most_bytes):
    there = load_logit_dataset(remote, cache_dir=tmp_path, cache_bytes=most_bytes)
    here = load_logit_dataset(grouped)
    for pack_length in (None, 48):
        settings = {"batch_size": 4, "seed": 2, "epochs": 2, "pack_length": pack_length}
        assert all_same(list(there.stream(**settings)), list(here.stream(**settings)))


def test_loader_workers_read_from_s3_and_share_one_copy_of_each_shard(grouped, bucket, tmp_path):
    address, server = bucket
    there = load_logit_dataset(address, cache_dir=tmp_path)
    settings = {"batch_size": 4, "seed": 2, "epochs": 2}
    loader = DataLoader(there.stream(**settings), batch_size=None, num_workers=2)
    assert all_same(list(loader), list(load_logit_dataset(grouped).stream(**settings)))
    fetched = [path for method, path in server.requests if method == "GET" and "/shards/" in path]
    assert len(fetched) == len(set(fetched)) == len([s for s in there.sources.datasets[0].shards if s.rows])


def fill(address: str, folder: str, barrier) -> None:
    dataset = open_dataset(address)
    cache = ShardCache(Path(folder), most_bytes=1 << 30)
    barrier.wait()
    for shard in dataset.shards:
        assert cache.path(dataset.store, shard.file).stat().st_size == shard.file.bytes


def test_two_processes_share_a_cache_and_copy_no_shard_twice(bucket, tmp_path):
    address, server = bucket
    context = multiprocessing.get_context("fork")  # as loader workers are
    barrier = context.Barrier(2)
    processes = [context.Process(target=fill, args=(address, str(tmp_path), barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    fetched = [path for method, path in server.requests if method == "GET" and "/shards/" in path]
    assert len(fetched) == len(set(fetched)) == len(open_dataset(address).shards)


def change(path: Path, kind: str) -> None:
    """Other bytes of the same size with the old times, by a new file or in place."""
    data, facts = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    if kind == "replaced":
        path.unlink()
    with path.open("r+b" if path.exists() else "xb") as file:
        file.write(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def verified_again(root: Path, cache: Path, known=None):
    dataset = open_dataset(root)
    opened, stamp = ShardCache(cache, most_bytes=1).open_verified(dataset.store, dataset.shards[0].file, known=known)
    opened.close()
    return stamp


@pytest.mark.parametrize("kind", ["replaced", "in place"])
def test_a_record_of_a_verified_shard_is_not_fooled_by_a_file_that_changed_later(grouped, tmp_path, kind):
    """Size and time of the file are as before: the times of the inode are not a program's to set."""
    root, cache = Path(shutil.copytree(grouped, tmp_path / "copy")), tmp_path / "cache"
    stamp = verified_again(root, cache)
    assert verified_again(root, cache) == stamp
    change(root / open_dataset(root).shards[0].file.name, kind)
    for known in (None, stamp):
        with pytest.raises(ShardDamaged):
            verified_again(root, cache, known)


def test_a_damaged_record_or_index_is_made_again(grouped, tmp_path):
    wanted = list(load_logit_dataset(grouped, cache_dir=tmp_path).stream(batch_size=4, seed=0, epochs=1))
    stored = [path for folder in ("index", "verified") for path in (tmp_path / folder).iterdir()]
    assert len(stored) == 2 * 3  # the fourth shard is empty
    for number, path in enumerate(stored):
        data = path.read_bytes()
        path.write_bytes([b"", data[:-3], bytes(len(data))][number % 3])
    assert all_same(
        list(load_logit_dataset(grouped, cache_dir=tmp_path).stream(batch_size=4, seed=0, epochs=1)), wanted
    )


def test_a_folder_for_copies_that_takes_no_file_is_a_named_error(remote, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed, match="COLDSTILL_CACHE"):
        list(load_logit_dataset(remote, cache_dir=tmp_path / "file" / "cache").stream(batch_size=4, seed=0, epochs=1))


def test_copies_made_at_the_same_time_stay_within_the_bound(remote, tmp_path):
    dataset = open_dataset(remote)
    files = [shard.file for shard in dataset.shards if shard.rows]
    most = sum(sorted((file.bytes for file in files), reverse=True)[:2])
    cache, seen = ShardCache(tmp_path, most_bytes=most), []

    def work(first: int) -> None:
        for number in range(12):
            cache.open(dataset.store, files[(first + number) % len(files)]).close()
            seen.append(sum(path.stat().st_size for path in copies(tmp_path) if path.exists()))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert len(seen) == 48
    assert max(seen) <= most
    assert not list(tmp_path.glob("*/_run/*"))
