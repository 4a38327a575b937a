"""Parts of other datasets, and files of other kinds, in the place of ours."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.commits import read_commit
from coldstill.storage_schema.errors import CommitDamaged
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.store import Store
from coldstill.tools.verify import verify
from tests.fuzz.bases import Base
from tests.fuzz.children import Child
from tests.fuzz.parquet_parts import Parts
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import (
    Read,
    change_document,
    change_parts,
    first_shard,
    written,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 9),
        ("token_count", 300),
        ("source_sha256", "1" * 64),
        ("about", {"license": "other"}),
        ("about", {"license": "CC0-1.0", "weather": "fine"}),
    ],
)
def test_a_header_that_differs_from_the_footer_s_is_named(tree: Tree, read: Read, field: str, value: object) -> None:
    change_document(tree, HEADER_NAME, lambda header: header.update({field: value}))
    tree.reseal()
    assert read(tree)["named"]["rows"] == "HeaderMismatch"


def test_a_shard_of_another_dataset_is_named(tree: Tree, bases: list[Base], read: Read) -> None:
    tree.files[first_shard(tree)] = next(data for name, data in bases[1].files.items() if name.startswith("shards/"))
    tree.reseal()
    assert read(tree)["named"]["rows"] == "HeaderMismatch"


def test_shards_that_changed_places_are_named(tree: Tree, read: Read) -> None:
    first, second = tree.named("shards/")
    tree.files[first], tree.files[second] = tree.files[second], tree.files[first]
    assert read(tree)["named"]["rows"] == "ShardDamaged"


def test_media_of_another_content_than_the_row_records_are_named(
    bases: list[Base], child: Child, tmp_path: Path
) -> None:
    tree = Tree(bases[2].files)
    tree.files["media/cat.png"] = b"another picture"
    tree.reseal()
    assert child.read(written(tree, tmp_path / "dataset"))["findings"] == ["FileDamaged"] * 2


@pytest.mark.parametrize("key_values", ["none", "twice", "not UTF-8"])
def test_a_footer_without_one_header_is_named(tree: Tree, read: Read, key_values: str) -> None:
    def change(parts: Parts) -> None:
        pairs = parts.key_values
        if key_values == "none":
            pairs.clear()
        elif key_values == "twice":
            pairs.append(pairs[0])
        else:
            parts.set_header(b"\xff\xfe" + pairs[0].get(2))

    change_parts(tree, change)
    assert read(tree)["named"]["rows"] in ("ShardDamaged", "InvalidHeader")


class _Planted:
    """What a pickle can do: make a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a pickle was opened")


@pytest.mark.parametrize("sealed", [True, False])
def test_pickles_in_the_place_of_files_are_never_opened(
    bases: list[Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    planted = tmp_path / "planted"
    for loader in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, loader, _refuse)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:  # as torch.save and np.savez write
        file.writestr("archive/data.pkl", pickle.dumps(_Planted(planted)))
    for number, name in enumerate(sorted(bases[2].files)):
        for kind, data in enumerate((pickle.dumps(_Planted(planted)), archive.getvalue())):
            tree = Tree(bases[2].files)
            tree.files[name] = data
            tree.files["extra.pkl"] = data
            if sealed:
                tree.reseal()
            root = written(tree, tmp_path / f"{number}-{kind}")
            if not name.startswith(("commits/", "rejects/")) and not (sealed and name.startswith("media/")):
                with pytest.raises(ColdstillError):
                    _fail_on_findings(root)
            elif name.startswith("commits/"):
                with pytest.raises(CommitDamaged):
                    read_commit(Store(root), int(Path(name).stem))
    assert not planted.exists()


def _fail_on_findings(root: Path) -> None:
    findings = verify(root, deep=True, progress=False)
    if findings:
        raise ColdstillError(findings[0].message)
