"""Laws of the store: files are written whole or not at all, and of several creators one wins."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import (
    CommitDamaged,
    StorageFailed,
    StorageFull,
    StoreUnreachable,
    UnsupportedStore,
)
from coldstill.storage_schema.store import RUN_FOLDER, Store
from tests.conftest import SmallDisk


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / "a root" if request.param == "local" else f"memory://{tmp_path.name}")


def test_of_many_creators_exactly_one_wins(store: Store) -> None:
    contents = [str(i).encode() * 1000 for i in range(16)]
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda data: store.create("commits/000000.json", data), contents))
    assert sum(won) == 1
    assert store.read("commits/000000.json") == contents[won.index(True)]


def test_put_replaces_and_create_does_not(store: Store) -> None:
    assert store.create("a/b", b"1")
    assert not store.create("a/b", b"2")
    assert store.read("a/b") == b"1"
    store.put("a/b", b"3")
    assert store.read("a/b") == b"3"
    assert store.names("a") == ["b"]
    assert store.names("absent") == []
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")


def test_nothing_is_left_beside_a_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create("a", b"1")
    store.create("a", b"2")
    store.put("b", b"3")
    assert list((tmp_path / RUN_FOLDER).iterdir()) == []


def test_a_file_is_written_while_another_process_removes_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two pulls into one folder, the first one to end removes them."""
    store, write = Store(tmp_path), Path.write_bytes
    monkeypatch.setattr("coldstill.common.retry.FIRST_WAIT_S", 0.0)
    for change in (store.put, store.create):
        removals = iter([True, False])

        def write_and_lose(path: Path, data: bytes, removals: Iterator[bool] = removals) -> int:
            written = write(path, data)
            if next(removals):
                Store(tmp_path).delete_folder(RUN_FOLDER)
            return written

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", write_and_lose)
            change(f"a/{change.__name__}", b"1")
        assert store.read(f"a/{change.__name__}") == b"1"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a//b", "./a", "a\\..\\b"])
def test_a_name_that_leaves_the_dataset_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CommitDamaged, match="a file's name"):
        Store(tmp_path).read(name)


def test_a_store_that_cannot_create_is_refused_by_name() -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(UnsupportedStore, match="only if it is absent"):
        Store("http://127.0.0.1/x").require_writable()


def test_a_file_where_a_folder_is_wanted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    (tmp_path / "link").symlink_to("gone")
    for name, found in (("x", "a file"), ("x/y/z", f"a file at {tmp_path}/x"), ("link/y", "a link to nothing at")):
        with pytest.raises(UnsupportedStore, match=f"found:  {found}"):
            Store(tmp_path / name).require_writable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "x"]


def test_a_refused_write_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("a file in the way")
    with pytest.raises(StorageFailed, match="writing shards/x"):
        Store(tmp_path).put("shards/x", b"1")
    with pytest.raises(StorageFailed, match="writing shards/x"):
        Store(tmp_path).create("shards/x", b"1")


def test_a_full_disk_has_a_name_and_leaves_what_was_there(small_disk: SmallDisk) -> None:
    small_disk.resize("64k")
    store = Store(small_disk.path)
    store.put("good", b"1")
    with pytest.raises(StorageFull, match="No space left"):
        store.put("large", bytes(1 << 20))
    assert sorted(path.name for path in small_disk.path.iterdir()) == [RUN_FOLDER, "good"]
    assert list((small_disk.path / RUN_FOLDER).iterdir()) == []
    assert store.read("good") == b"1"


def test_a_server_that_does_not_answer_is_no_missing_file() -> None:
    """fsspec raises FileNotFoundError in both cases."""
    pytest.importorskip("aiohttp")
    with pytest.raises(StoreUnreachable):
        open_dataset("http://127.0.0.1:1/dataset")
    with pytest.raises(StoreUnreachable):
        Store("http://127.0.0.1:1/dataset").size("shards/x")
