"""Laws of files with a recorded size and digest: read, checked and copied right, or an error that names the file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import pytest

from coldstill.storage_schema.errors import FileDamaged, FileMissing, ShardDamaged, ShardMissing
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.verified_files import (
    BLOCK_BYTES,
    FileRecord,
    check_file,
    copy_file,
    file_record,
    read_file,
)
from tests.pipeline.buckets import s3_bucket

CONTENT = b"content" * 1000
MANY_BLOCKS = bytes(range(256)) * ((2 * BLOCK_BYTES) // 256) + b"rest"


@pytest.fixture
def source(tmp_path: Path) -> Store:
    return Store(tmp_path / "source")


@pytest.fixture
def destination(tmp_path: Path) -> Store:
    return Store(tmp_path / "destination")


def stored(store: Store, name: str = "shards/a.parquet", content: bytes = CONTENT) -> FileRecord:
    store.put(name, content)
    return file_record(name, content)


def nothing(_: int) -> None:
    """Progress that is not shown."""


def test_a_right_file_is_read_and_checked(source: Store) -> None:
    file = stored(source, content=MANY_BLOCKS)
    assert read_file(source, file) == MANY_BLOCKS
    check_file(source, file)


@pytest.mark.parametrize(
    ("name", "missing", "damaged"),
    [("shards/a.parquet", ShardMissing, ShardDamaged), ("tokenizer/tokenizer.json", FileMissing, FileDamaged)],
)
def test_damage_is_named_by_every_reader_of_the_file(
    source: Store, destination: Store, name: str, missing: type[FileMissing], damaged: type[FileDamaged]
) -> None:
    file = stored(source, name)
    others = {
        "shorter": CONTENT[:-1],
        "longer": CONTENT + b"x",
        "other": CONTENT[:-1] + b"x",
    }
    for content in others.values():
        source.put(name, content)
        for use in (read_file, check_file, lambda store, file: copy_file(store, file, destination, nothing)):
            with pytest.raises(damaged, match=name) as caught:
                use(source, file)
            assert type(caught.value) is damaged
    source.delete(name)
    for use in (read_file, check_file, lambda store, file: copy_file(store, file, destination, nothing)):
        with pytest.raises(missing, match=name) as caught_missing:
            use(source, file)
        assert type(caught_missing.value) is missing
    assert not destination.exists(name)


def test_a_file_that_is_too_large_is_not_read(source: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    file = stored(source)
    monkeypatch.setattr(source, "read", None)
    with pytest.raises(FileDamaged, match="at most 10"):
        read_file(source, file, at_most=10)


def test_a_file_is_copied_once_and_every_byte_is_reported(source: Store, destination: Store) -> None:
    file = stored(source, content=MANY_BLOCKS)
    blocks: list[int] = []
    assert copy_file(source, file, destination, blocks.append) is True
    assert destination.read(file.name) == MANY_BLOCKS
    assert len(blocks) == 3
    assert copy_file(source, file, destination, blocks.append) is False
    assert sum(blocks) == 2 * len(MANY_BLOCKS)


def test_a_wrong_file_at_the_destination_is_replaced(source: Store, destination: Store) -> None:
    file = stored(source)
    destination.put(file.name, b"x" * len(CONTENT))
    assert copy_file(source, file, destination, nothing) is True
    assert destination.read(file.name) == CONTENT


def test_a_copy_that_is_ended_in_the_middle_leaves_nothing(source: Store, destination: Store) -> None:
    file = stored(source, content=MANY_BLOCKS)

    def end(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_file(source, file, destination, end)
    assert not destination.exists(file.name)
    assert [path for path in Path(destination.root).rglob("*") if path.is_file()] == []


def test_a_local_file_is_uploaded_to_a_remote_store(source: Store) -> None:
    file = stored(source)
    remote = Store("memory://verified-files")
    assert copy_file(source, file, remote, nothing) is True
    assert remote.read(file.name) == CONTENT
    assert copy_file(source, file, remote, nothing) is False
    remote.delete_folder("shards")


def test_a_source_that_is_deleted_while_it_is_copied_is_missing_and_not_a_failed_write(
    source: Store, destination: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deleted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise FileNotFoundError("the object is gone")

    record = stored(source)
    monkeypatch.setattr(source, "open", lambda name: Deleted())
    monkeypatch.setattr(source, "is_local", False)
    with pytest.raises(ShardMissing, match="source"):
        copy_file(source, record, destination, on_block=lambda _: None)
    assert not destination.exists(record.name)


def test_an_object_that_is_replaced_while_it_is_read_is_damaged(
    monkeypatch: pytest.MonkeyPatch, destination: Store
) -> None:
    with s3_bucket(monkeypatch) as (address, _):
        source = Store(f"{address}/dataset")
        file = stored(source)
        opened = Store.open

        def open_and_replace(store: Store, name: str) -> BinaryIO:
            found = opened(store, name)
            if store is source:
                Store(source.url).put(name, bytes(len(CONTENT)))
            return found

        monkeypatch.setattr(Store, "open", open_and_replace)
        for use in (lambda: copy_file(source, file, destination, nothing), lambda: check_file(source, file)):
            source.put(file.name, CONTENT)
            with pytest.raises(ShardDamaged, match="put in its place while it was read"):
                use()
        with pytest.raises(FileNotFoundError):
            destination.size(file.name)
