"""Laws of reading local files: a dataset from a stranger reaches no other file of this machine, and nothing hangs."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import CommitDamaged, OutsideDataset, StorageFailed, UnsupportedStore
from coldstill.storage_schema.store import Store
from coldstill.tools.verify import verify

READS: list[Callable[[Store, str], object]] = [Store.read, Store.open, Store.size]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "a dataset"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "x").write_bytes(b"0123456789")
    return folder


@pytest.mark.parametrize("read", READS)
def test_a_link_that_leads_out_is_refused(root: Path, tmp_path: Path, read: Callable[[Store, str], object]) -> None:
    (tmp_path / "a dataset but another").mkdir()
    (tmp_path / "a dataset but another" / "secret").write_text("of this machine")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "relative").symlink_to("../a dataset but another/secret")
    (root / "shards" / "chained").symlink_to("../relative")
    (root / "folder").symlink_to(tmp_path / "a dataset but another")
    (root / "dangling").symlink_to("/nonexistent")
    for name in ("absolute", "relative", "shards/chained", "folder/secret", "dangling"):
        with pytest.raises(OutsideDataset, match="a link to"):
            read(Store(root), name)


@pytest.mark.parametrize("read", READS)
def test_what_never_ends_is_refused(root: Path, read: Callable[[Store, str], object]) -> None:
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    with pytest.raises(OutsideDataset, match="pipe"):
        read(Store(root), "pipe")
    with pytest.raises(StorageFailed, match="reading loop"):
        read(Store(root), "loop")


@pytest.mark.parametrize("read", READS)
def test_a_file_that_is_not_there_is_no_other_error(root: Path, read: Callable[[Store, str], object]) -> None:
    for name in ("absent", "shards", "shards/x/below"):
        with pytest.raises(FileNotFoundError):
            read(Store(root), name)


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800"])
def test_a_name_that_no_file_has_is_refused(root: Path, name: str) -> None:
    with pytest.raises(CommitDamaged, match="a file's name"):
        Store(root).read(name)


def test_links_inside_a_dataset_and_to_a_dataset_are_followed(root: Path, tmp_path: Path) -> None:
    (root / "same").symlink_to("shards/x")
    (tmp_path / "link to it").symlink_to(root)
    for store in (Store(root), Store(tmp_path / "link to it")):
        assert store.read("same") == b"0123456789"
        assert store.size("same") == 10


def test_a_snapshot_of_the_hubs_cache_is_read_and_its_links_go_no_further(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "0123", tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "digest").write_bytes(b"data")
    (blobs / "evil").symlink_to("/etc/passwd")
    (tmp_path / "datasets--a--b" / "secret").write_bytes(b"beside")
    for name, target in (("good", "blobs/digest"), ("evil", "blobs/evil"), ("beside", "secret")):
        (snapshot / name).symlink_to(f"../../{target}")
    assert Store(snapshot).read("good") == b"data"
    for name in ("evil", "beside"):
        with pytest.raises(OutsideDataset):
            Store(snapshot).read(name)


def test_a_dataset_unpacked_from_a_strangers_archive_shows_no_file_of_ours(tiny_dataset: Path, tmp_path: Path) -> None:
    shard = open_dataset(tiny_dataset).shards[0].file.name
    (tiny_dataset / shard).unlink()
    (tiny_dataset / shard).symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "gift.tar", "w") as archive:
        archive.add(tiny_dataset, "gift")
    with tarfile.open(tmp_path / "gift.tar") as archive:
        archive.extractall(tmp_path, filter="fully_trusted")
    with pytest.raises(OutsideDataset):
        open_dataset(tmp_path / "gift").row(0)
    assert [finding.error for finding in verify(tmp_path / "gift", progress=False)] == ["OutsideDataset"]


def test_an_open_file_is_read_where_it_is_asked_for(root: Path) -> None:
    with Store(root).open("shards/x") as file:
        assert file.seekable()
        assert file.seek(-3, os.SEEK_END) == 7
        assert file.read() == b"789"


def test_a_file_is_received_whole_or_not_at_all(root: Path) -> None:
    store = Store(root)
    with store.receive("shards/y") as path:
        path.write_bytes(b"new")
        assert not (root / "shards" / "y").exists()
    assert store.read("shards/y") == b"new"
    with pytest.raises(StorageFailed, match="writing shards/y"), store.receive("shards/y") as path:  # noqa: PT012
        path.write_bytes(b"half")
        raise OSError("the source broke")
    assert store.read("shards/y") == b"new"
    assert list((root / "_run").iterdir()) == []


@pytest.mark.parametrize("url", ["nosuchprotocol://a/b", "hf://", "memory://", "hf://one"])
def test_an_address_that_no_store_has_is_refused_by_name(url: str) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises((UnsupportedStore, StorageFailed)):
        Store(url).read("manifest.json")
