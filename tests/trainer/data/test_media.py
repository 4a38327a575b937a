"""Media of a remote dataset: copied once, verified, within a bound of bytes, and never needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import FileDamaged, FileMissing
from coldstill.storage_schema.rows import CachedRow, MediaReference
from coldstill.storage_schema.store import Store
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.data.media import MediaCache, MediaReader
from tests import vision

COUNTS = [2, 0, 1, 3]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[CachedRow]:
    return vision.vision_rows(vision.llava_model(tmp_path_factory.mktemp("model")), COUNTS)


@pytest.fixture(scope="module")
def local(rows: list[CachedRow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    vision.vision_tokenizer().save_pretrained(folder / "tokenizer")
    return vision.vision_dataset(folder / "dataset", [rows], tokenizer=folder / "tokenizer", in_row_bytes=0)


@pytest.fixture
def remote(local: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(f"{local}/", "/vision/", recursive=True)
    yield "memory://vision"
    memory.rm("/vision", recursive=True)


def items_of(dataset: Dataset) -> list[MediaReference]:
    return [item for row in dataset.rows() for item in row.media]


def contents(rows: list[CachedRow]) -> list[bytes]:
    return [item.data for row in rows for item in row.media]


def test_media_of_rows_and_of_files_are_the_source_s_bytes(local: Path, rows: list[CachedRow], tmp_path: Path) -> None:
    dataset = open_dataset(local)
    reader = MediaReader(dataset, dataset.store, cache=MediaCache(tmp_path, most_bytes=0))
    assert [reader.content(item) for item in items_of(dataset)] == contents(rows)
    assert [reader.content(item) for row in rows for item in row.media] == contents(rows)
    assert not list(tmp_path.iterdir())


def test_a_remote_medium_is_copied_once_and_read_when_it_is_gone(
    remote: str, rows: list[CachedRow], tmp_path: Path
) -> None:
    dataset = open_dataset(remote)
    items = items_of(dataset)
    cache = MediaCache(tmp_path, most_bytes=1 << 20)
    reader = MediaReader(dataset, Store(remote), cache=cache)
    assert [reader.content(item) for item in items] == contents(rows)
    for item in items:
        dataset.store.delete(item.path)
    assert [reader.content(item) for item in items] == contents(rows)
    # A copy that a crash cut is not used.
    copy = next(path for path in (tmp_path / "media").rglob("*") if path.name == items[0].sha256)
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(FileMissing):
        reader.content(items[0])


@pytest.mark.parametrize("fitting", [1, 2, 4])
def test_copies_of_media_stay_within_the_bound(tmp_path: Path, fitting: int) -> None:
    size = 1000
    cache = MediaCache(tmp_path, most_bytes=fitting * size)
    stored = [os.urandom(size) for _ in range(12)]
    for data in stored:
        digest = hashlib.sha256(data).hexdigest()
        cache.keep(digest, data)
        assert cache.read(digest) == data
        copies = list((tmp_path / "media").glob("??/*"))
        assert sum(path.stat().st_size for path in copies) <= fitting * size
    cache.keep(hashlib.sha256(bytes(5000)).hexdigest(), bytes(5000))
    assert cache.read(hashlib.sha256(bytes(5000)).hexdigest()) is None


def test_the_least_recently_used_copies_go_first(tmp_path: Path) -> None:
    cache = MediaCache(tmp_path, most_bytes=16_000)
    digests = []
    for number in range(16):
        data = os.urandom(1000)
        digests.append(hashlib.sha256(data).hexdigest())
        cache.keep(digests[-1], data)
        os.utime(tmp_path / "media" / digests[-1][:2] / digests[-1], ns=(number, number))
    assert cache.read(digests[0]) is not None  # used now
    data = os.urandom(1000)
    cache.keep(hashlib.sha256(data).hexdigest(), data)
    found = [cache.read(digest) is not None for digest in digests]
    assert found[0]
    assert found.count(False) <= 3
    assert not found[1]
    assert all(found[4:])


def test_a_medium_that_the_manifest_does_not_name_or_with_another_digest_is_named(local: Path, tmp_path: Path) -> None:
    dataset = open_dataset(local)
    reader = MediaReader(dataset, dataset.store, cache=MediaCache(tmp_path, most_bytes=0))
    item, other = items_of(dataset)[:2]
    with pytest.raises(FileMissing, match="manifest"):
        reader.content(MediaReference(position=0, type="image/png", sha256="0" * 64, path="media/other.png"))
    with pytest.raises(FileDamaged):
        reader.content(MediaReference(position=0, type="image/png", sha256=other.sha256, path=item.path))


def test_media_of_a_remote_dataset_get_a_quarter_of_the_cache(remote: str, local: Path, tmp_path: Path) -> None:
    sources = load_logit_dataset(remote, cache_dir=tmp_path, cache_bytes=4000).sources
    assert (sources.cache.most_bytes, sources.media_cache.most_bytes) == (3000, 1000)
    sources = load_logit_dataset(local, cache_dir=tmp_path, cache_bytes=4000).sources
    assert (sources.cache.most_bytes, sources.media_cache.most_bytes) == (4000, 0)


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = MediaCache(tmp_path / "file", most_bytes=1000)
    cache.keep("0" * 64, b"abc")
    assert cache.read("0" * 64) is None
