"""Names and links that leave the dataset are refused before any file is opened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldstill.storage_schema.commits import read_commit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import CommitDamaged, OutsideDataset
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.store import Store
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import (
    Read,
    change_document,
    change_row,
    first_shard,
    written,
)

NAMES = (
    "../x",
    "shards/../../x",
    "/etc/passwd",
    "..\\x",
    "C:\\x",
    "a\\b",
    "a\0b",
    "",
    ".",
    "a//b",
    "a/./b",
    "a/",
    "a\nb",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["shards", "files"])
def test_a_name_in_the_manifest_that_leaves_the_dataset_is_refused(
    tree: Tree, tmp_path: Path, name: str, which: str
) -> None:
    def rename(document: Any) -> None:
        record = document["shards"][0]["file"] if which == "shards" else document["files"][0]
        record["name"] = name

    change_document(tree, MANIFEST_NAME, rename)
    with pytest.raises(CommitDamaged, match="inside the dataset"):
        open_dataset(written(tree, tmp_path / "dataset"))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_commit_record_that_leaves_the_dataset_is_never_read(tree: Tree, tmp_path: Path, name: str) -> None:
    change_document(tree, "commits/000000.json", lambda document: document["shard"].update(name=name))
    store = Store(written(tree, tmp_path / "dataset"))
    with pytest.raises(CommitDamaged, match="inside the dataset"):
        store.read(read_commit(store, 0).shard.name)


@pytest.mark.parametrize("path", ["../x.png", "/etc/passwd", "media/../x", "media/a/b", "media/a\0", "x.png", ""])
def test_a_path_of_media_outside_their_folder_is_refused(tree: Tree, read: Read, path: str) -> None:
    media = {"position": 1, "type": "image/png", "sha256": "0" * 64, "path": path, "bytes": None}
    change_row(tree, media=[media])
    assert read(tree)["named"]["rows"] == "InvalidRow"


def test_a_link_that_leads_out_of_the_dataset_is_refused(tree: Tree, read: Read, tmp_path: Path) -> None:
    root = written(tree, tmp_path / "dataset")
    for name in (first_shard(tree), "tokenizer/tokenizer.json"):
        data = tree.files.pop(name)
        (tmp_path / "outside").write_bytes(data)
        (root / name).unlink()
        (root / name).symlink_to(tmp_path / "outside")
    answer = read(tree)
    assert answer["named"]["rows"] == answer["named"]["single"] == "OutsideDataset"
    assert set(answer["findings"]) == {"OutsideDataset"}


def test_a_pipe_in_the_place_of_a_shard_is_refused_and_not_waited_for(tree: Tree, read: Read, tmp_path: Path) -> None:
    root = written(tree, tmp_path / "dataset")
    name = first_shard(tree)
    del tree.files[name]
    (root / name).unlink()
    os.mkfifo(root / name)
    assert read(tree)["named"]["rows"] == "OutsideDataset"


@pytest.mark.parametrize("folder", ["card", "shards", "_run"])
def test_nothing_is_written_or_deleted_through_a_link_that_leaves_the_dataset(tmp_path: Path, folder: str) -> None:
    """`coldstill card` would replace files of anyone who reads a stranger's dataset."""
    outside, store = tmp_path / "outside", Store(tmp_path / "dataset")
    outside.mkdir()
    (outside / "x").write_text("mine")
    store.put("a", b"")
    shutil.rmtree(tmp_path / "dataset" / folder, ignore_errors=True)
    (tmp_path / "dataset" / folder).symlink_to(outside)
    changes: list[Callable[[], object]] = [
        lambda: store.put(f"{folder}/x", b"theirs"),
        lambda: store.create(f"{folder}/y", b"theirs"),
        lambda: store.receive(f"{folder}/x").__enter__(),
        lambda: store.delete(f"{folder}/x"),
        lambda: store.delete_folder(folder),
        lambda: store.delete_folder(f"{folder}/x"),
    ]
    for change in changes:
        with pytest.raises(OutsideDataset):
            change()
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("x", "mine")]


def test_a_link_within_the_dataset_and_one_to_the_dataset_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "real" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "a").symlink_to("b")
    store = Store(tmp_path / "link")
    store.put("a/x", b"1")
    assert (tmp_path / "real" / "b" / "x").read_bytes() == b"1"
    store.delete("a/x")
    assert not store.exists("a/x")
