"""Laws of media: stored once under the name of their content, listed by their units, verified when they are read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldstill.common.models import MAX_DOCUMENT_BYTES, parse_document
from coldstill.storage_schema import media
from coldstill.storage_schema.commits import CommitRecord, commit_name, commit_unit, committed_units, discard_unusable
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import (
    CommitDamaged,
    FileDamaged,
    FileMissing,
    InvalidRow,
    StorageFailed,
    TooManyMedia,
    UnitsMissing,
)
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, Manifest, ShardRecord, seal
from coldstill.storage_schema.repair import reopen_damaged
from coldstill.storage_schema.rows import CachedRow, MediaReference
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.verified_files import FileRecord
from tests import making
from tests.pipeline.buckets import s3_bucket

IN_ROW = 16
SMALL, LARGE, OTHER = b"small", b"a large image, longer than 16 bytes", b"another image that is longer than 16 bytes"


@pytest.fixture(scope="module")
def header(tokenizer_folder: Path) -> DatasetHeader:
    return making.tiny_header(tokenizer_folder, about={"media_in_row_bytes": IN_ROW})


@pytest.fixture(params=["local", "memory", "s3"])
def store(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    header: DatasetHeader,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Store]:
    roots = {"local": str(tmp_path / "root"), "memory": f"memory://{tmp_path.name}"}
    with ExitStack() as stack:
        root = roots.get(request.param) or stack.enter_context(s3_bucket(monkeypatch))[0] + "/dataset"
        yield making.begin_dataset(root, header, tokenizer_folder, [1, 1])


def name_of(content: bytes) -> str:
    return f"media/{hashlib.sha256(content).hexdigest()}.png"


def row_with(*contents: bytes, seed: int = 0) -> CachedRow:
    row = making.random_row(np.random.default_rng(seed), f"row-{seed}", length=12)
    items = (
        MediaReference(position=at, type="image/png", sha256=hashlib.sha256(content).hexdigest(), data=content)
        for at, content in enumerate(contents)
    )
    return dataclasses.replace(row, media=tuple(items))


def commit(store: Store, header: DatasetHeader, unit: int, *rows: CachedRow) -> CommitRecord:
    return commit_unit(store, unit, rows=rows, rejects=[], header=header, environment={})


def contents(rows: Sequence[CachedRow]) -> list[list[bytes | None]]:
    return [[item.data for item in row.media] for row in rows]


def test_large_media_become_files_named_by_their_content_and_small_ones_stay(
    store: Store, header: DatasetHeader
) -> None:
    first = commit(store, header, 0, row_with(SMALL, LARGE, LARGE, seed=1))
    second = commit(store, header, 1, row_with(LARGE, OTHER, b"x" * IN_ROW, seed=2))
    assert [file.name for file in first.media] == [name_of(LARGE)]
    assert [file.name for file in second.media] == sorted([name_of(LARGE), name_of(OTHER)])
    manifest = seal(store)
    listed = {file.name: file for file in manifest.files if file.name.startswith("media/")}
    assert set(listed) == {name_of(LARGE), name_of(OTHER)} == {f"media/{name}" for name in store.names("media")}
    dataset = open_dataset(store.url)
    rows = list(dataset.rows())
    assert contents(rows) == [[SMALL, None, None], [None, None, b"x" * IN_ROW]]
    assert [[dataset.media_content(item) for item in row.media] for row in rows] == [
        [SMALL, LARGE, LARGE],
        [LARGE, OTHER, b"x" * IN_ROW],
    ]


def test_a_file_that_is_there_whole_is_not_written_again(tmp_path: Path, header: DatasetHeader) -> None:
    store = Store(tmp_path)
    commit(store, header, 0, row_with(LARGE))
    before = (tmp_path / name_of(LARGE)).stat()
    commit(store, header, 1, row_with(LARGE, seed=1))
    after = (tmp_path / name_of(LARGE)).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("damage", [b"", LARGE[:-1], LARGE[:-1] + b"?"])
def test_a_damaged_file_is_written_again(store: Store, header: DatasetHeader, damage: bytes) -> None:
    store.put(name_of(LARGE), damage)
    commit(store, header, 0, row_with(LARGE))
    assert store.read(name_of(LARGE)) == LARGE


def test_captures_in_any_order_and_after_any_interruption_are_the_same_dataset(
    tmp_path: Path, header: DatasetHeader, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row_with(SMALL, LARGE, seed=0), row_with(OTHER, LARGE, b"y" * 99, seed=1)]
    ids, failed, left = [], 0, [-1]

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(self: Store, name: str, data: bytes) -> Any:
            if left[0] == 0:
                raise StorageFailed("the power")
            left[0] -= 1
            return real(self, name, data)

        return write

    for name in ("put", "create"):
        monkeypatch.setattr(Store, name, failing(getattr(Store, name)))
    for writes in range(-1, 8):
        store = making.begin_dataset(tmp_path / str(writes), header, tokenizer_folder, [1, 1])
        left[0] = writes
        for unit in (0, 1) if writes % 2 else (1, 0):
            try:
                commit(store, header, unit, rows[unit])
            except StorageFailed:
                failed += 1
                assert unit not in committed_units(store)
                left[0] = -1
                commit(store, header, unit, rows[unit])
        left[0] = -1
        seal(store)
        ids.append(open_dataset(store.url).dataset_id)
    assert len(set(ids)) == 1
    assert failed == 7  # three media, two shards, two records


def test_without_a_size_in_the_header_all_media_are_in_their_rows(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = making.tiny_header(tokenizer_folder)
    making.write_dataset(tmp_path, [[row_with(SMALL, LARGE)]], header=header, tokenizer=tokenizer_folder)
    assert contents(list(open_dataset(tmp_path).rows())) == [[SMALL, LARGE]]
    monkeypatch.setattr(media, "MAX_IN_ROW_BYTES", len(LARGE) + 2)
    placed = media.place_media([row_with(LARGE, SMALL, b"x")], in_row_bytes=None)  # a row holds what a row can hold
    assert contents(placed.rows) == [[LARGE, None, b"x"]]
    assert placed.files == {name_of(SMALL): SMALL}


def test_media_of_no_record_go_at_sealing_and_other_names_stay(store: Store, header: DatasetHeader) -> None:
    store.put(name_of(OTHER), OTHER)  # of a worker that was killed before its record
    store.put("media/holiday.png", b"somebody's own picture")
    for unit in range(2):
        commit(store, header, unit, row_with(LARGE, seed=unit))
    manifest = seal(store)
    assert [file.name for file in manifest.files if file.name.startswith("media/")] == [name_of(LARGE)]
    assert store.names("media") == sorted([name_of(LARGE).removeprefix("media/"), "holiday.png"])


def test_a_dataset_that_an_earlier_release_started_keeps_all_media(store: Store, header: DatasetHeader) -> None:
    store.put("media/cat.png", b"cat")
    records = [commit(store, header, unit, row_with(SMALL, seed=unit)) for unit in range(2)]
    store.put(commit_name(0), records[0].model_dump_json(exclude={"media"}).encode())
    assert [file.name for file in seal(store).files if file.name.startswith("media/")] == ["media/cat.png"]


def test_an_attempt_that_loses_deletes_no_medium(store: Store, header: DatasetHeader) -> None:
    commit(store, header, 1, row_with(OTHER))
    first = commit(store, header, 0, row_with(LARGE))
    assert commit(store, header, 0, row_with(OTHER, LARGE)) == first
    seal(store)
    assert store.read(name_of(OTHER)) == OTHER


@pytest.mark.parametrize("damage", [None, b"short"])
def test_units_with_a_lost_medium_are_made_again(store: Store, header: DatasetHeader, damage: bytes | None) -> None:
    rows = [row_with(LARGE, seed=0), row_with(LARGE, OTHER, seed=1)]
    records = [commit(store, header, unit, row) for unit, row in enumerate(rows)]
    store.delete(name_of(OTHER))
    if damage:
        store.put(name_of(OTHER), damage)
    assert discard_unusable(store, records) == [1]
    assert committed_units(store) == {0}
    commit(store, header, 1, rows[1])
    seal(store)
    assert store.read(name_of(OTHER)) == OTHER


def test_other_bytes_of_the_same_size_are_found_by_reading(store: Store, header: DatasetHeader) -> None:
    records = [commit(store, header, unit, row_with(LARGE, seed=unit)) for unit in range(2)]
    store.put(name_of(LARGE), LARGE[::-1])
    assert discard_unusable(store, records) == []
    assert discard_unusable(store, records, deep=True) == [0, 1]


def test_sealing_notices_a_lost_medium(store: Store, header: DatasetHeader) -> None:
    for unit in range(2):
        commit(store, header, unit, row_with(LARGE if unit else SMALL, seed=unit))
    store.delete(name_of(LARGE))
    with pytest.raises(UnitsMissing, match="1 whose files are gone or damaged, the first is 1"):
        seal(store)
    commit(store, header, 1, row_with(LARGE, seed=1))
    seal(store)


def test_a_reference_to_a_file_that_is_not_there_is_no_unit(store: Store, header: DatasetHeader) -> None:
    item = MediaReference(position=0, type="image/png", sha256=hashlib.sha256(LARGE).hexdigest(), path=name_of(LARGE))
    row = dataclasses.replace(row_with(), media=(item,))
    with pytest.raises(FileMissing, match="row-0"):
        commit(store, header, 0, row)
    store.put(name_of(LARGE), OTHER)
    with pytest.raises(FileDamaged, match="sha256"):
        commit(store, header, 0, row)
    store.put(name_of(LARGE), LARGE)
    assert [file.name for file in commit(store, header, 0, row).media] == [name_of(LARGE)]


def test_content_of_another_digest_is_no_file(store: Store, header: DatasetHeader) -> None:
    row = row_with(LARGE)
    row = dataclasses.replace(row, media=(dataclasses.replace(row.media[0], sha256="0" * 64),))
    with pytest.raises(InvalidRow, match="sha256"):
        commit(store, header, 0, row)
    assert store.names("media") == []


def test_more_files_than_a_manifest_lists_have_a_name(
    store: Store, header: DatasetHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "MAX_MEDIA_FILES", 1)
    commit(store, header, 1, row_with(LARGE, OTHER))
    with pytest.raises(TooManyMedia, match=r"source\.images_in_row_bytes"):  # long before sealing
        commit(store, header, 0, row_with(LARGE))
    monkeypatch.setattr(media, "MAX_MEDIA_FILES", 2)
    commit(store, header, 0, row_with(LARGE))
    monkeypatch.setattr(media, "MAX_MEDIA_FILES", 1)
    with pytest.raises(TooManyMedia, match="2 files in media/"):
        seal(store)
    assert not store.exists(MANIFEST_NAME)
    assert len(store.names("media")) == 2


def test_a_manifest_that_would_be_too_large_to_read_is_not_written(
    store: Store, header: DatasetHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unit in range(2):
        commit(store, header, unit, row_with(LARGE, seed=unit))
    monkeypatch.setattr("coldstill.storage_schema.manifest.MAX_DOCUMENT_BYTES", 500)
    with pytest.raises(TooManyMedia, match="2 units, 1 media files"):
        seal(store)
    assert not store.exists(MANIFEST_NAME)


@pytest.mark.slow
def test_a_manifest_has_room_for_the_files_that_are_allowed() -> None:
    units, rows, targets = 14_000, 1024, 99_999_999
    most = media.MAX_MEDIA_FILES
    media_files = [FileRecord(name=f"media/{n:064x}.webp", bytes=64 << 20, sha256=f"{n:064x}") for n in range(most)]
    shards, rejects = [], []
    for unit in range(units):
        file = FileRecord(name=f"shards/{unit:06d}-{'a' * 12}.parquet", bytes=480_000_000, sha256="a" * 64)
        shards.append(ShardRecord(unit=unit, file=file, rows=rows, tokens=targets, targets=targets, rejected=100))
        rejects.append(FileRecord(name=f"rejects/{unit:06d}-{'a' * 12}.jsonl", bytes=480_000, sha256="a" * 64))
    totals = {"rows": rows, "tokens": targets, "targets": targets, "rejected": 100}
    manifest = Manifest(
        **{name: units * each for name, each in totals.items()}, shards=tuple(shards), files=(*media_files, *rejects)
    )
    media.require_room(units=units, media=len(media_files), where="")
    data = manifest.to_bytes()
    assert len(data) <= MAX_DOCUMENT_BYTES
    assert parse_document(data, model=Manifest, where="", error=CommitDamaged) == manifest
    assert manifest.foreign_names == ()


def test_content_is_verified_when_it_is_read(
    store: Store, header: DatasetHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unit in range(2):
        commit(store, header, unit, row_with(SMALL, LARGE, seed=unit))
    seal(store)
    dataset = open_dataset(store.url)
    small, large = dataset.row(0).media
    with pytest.raises(FileMissing, match="manifest"):
        dataset.media_content(dataclasses.replace(large, path=name_of(OTHER)))
    with pytest.raises(FileMissing, match="manifest"):
        dataset.media_content(dataclasses.replace(large, path="dataset.json"))
    for item in (small, large):
        with pytest.raises(FileDamaged, match="sha256"):
            dataset.media_content(dataclasses.replace(item, sha256="0" * 64))
    monkeypatch.setattr("coldstill.storage_schema.dataset.MAX_MEDIA_BYTES", len(LARGE) - 1)
    with pytest.raises(FileDamaged, match="size"):
        dataset.media_content(large)
    monkeypatch.undo()
    store.put(name_of(LARGE), LARGE[::-1])
    with pytest.raises(FileDamaged, match="sha256"):
        dataset.media_content(large)
    store.delete(name_of(LARGE))
    with pytest.raises(FileMissing, match="no such file"):
        dataset.media_content(large)


def test_a_sealed_dataset_that_lost_a_medium_is_made_whole_by_its_capture(store: Store, header: DatasetHeader) -> None:
    rows = [row_with(SMALL, seed=0), row_with(LARGE, OTHER, seed=1)]
    for unit, row in enumerate(rows):
        commit(store, header, unit, row)
    seal(store)
    before = open_dataset(store.url).dataset_id
    for keeps_records in (True, False):  # a copy of a dataset has no commit records
        if not keeps_records:
            store.delete_folder("commits")
        store.delete(name_of(LARGE))
        reopened = reopen_damaged(store)
        assert reopened.units == (1,)
        assert reopened.files == (name_of(LARGE),)
        commit(store, header, 1, rows[1])
        seal(store)
        assert open_dataset(store.url).dataset_id == before


def test_a_repair_of_another_file_keeps_all_media(store: Store, header: DatasetHeader) -> None:
    rows = [row_with(SMALL, LARGE, seed=0), row_with(OTHER, seed=1)]
    for unit, row in enumerate(rows):
        commit(store, header, unit, row)
    manifest = seal(store)
    before = open_dataset(store.url).dataset_id
    store.delete_folder("commits")
    store.delete(manifest.shards[1].file.name)
    assert reopen_damaged(store).units == (1,)
    commit(store, header, 1, rows[1])
    seal(store)
    assert open_dataset(store.url).dataset_id == before
