"""Laws of `coldstill upgrade`: the same rows under a header of the newest format, however often it is interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import DatasetNotSealed, FileDamaged
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.store import Store
from coldstill.tools.derive.merge import merge
from coldstill.tools.derive.split import split
from coldstill.tools.derive.subset import subset
from coldstill.tools.upgrade import upgrade
from coldstill.tools.verify import verify
from tests.tools.derive.parts import assert_equal_rows

GOLDEN = Path(__file__).parents[1] / "storage_schema" / "golden" / "format_v1"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.fixture(params=NAMES)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a golden dataset of format 1."""
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path / "old"))


def _shards(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "shards").iterdir()}


def test_an_upgraded_dataset_has_the_same_shards_and_rows(old: Path, tmp_path: Path) -> None:
    before = open_dataset(shutil.copytree(old, tmp_path / "before"))

    after = upgrade(old)

    assert (before.header.format_version, after.header.format_version) == (1, 2)
    assert _shards(old) == _shards(tmp_path / "before")
    assert_equal_rows(list(after.rows()), list(before.rows()))
    assert after.manifest.derived_from == (before.dataset_id,)
    assert after.dataset_id != before.dataset_id
    assert after.header.about.license == before.header.about.license
    assert len(after.faithfulness_sample()) == len(before.faithfulness_sample()) > 0
    assert verify(old, deep=True, progress=False) == []


def test_a_second_upgrade_changes_nothing(old: Path) -> None:
    first = upgrade(old).dataset_id
    assert upgrade(old).dataset_id == first


def test_an_interrupted_upgrade_is_named_and_resumed(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = upgrade(shutil.copytree(old, tmp_path / "unbroken")).dataset_id
    put = Store.put

    def killed(store: Store, name: str, data: bytes) -> None:
        if name == MANIFEST_NAME:
            raise KeyboardInterrupt
        put(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            upgrade(old)
    with pytest.raises(FileDamaged, match=r"dataset\.json(.|\n)*coldstill upgrade"):
        open_dataset(old)

    assert upgrade(old).dataset_id == unbroken


def test_a_damaged_header_is_not_upgraded(old: Path) -> None:
    path = old / "dataset.json"
    path.write_bytes(path.read_bytes().replace(b"CC0-1.0", b"CC0-2.0"))
    shutil.rmtree(old / "shards")
    with pytest.raises(FileDamaged, match=r"dataset\.json"):
        upgrade(old)


def test_an_unsealed_dataset_is_not_upgraded(old: Path) -> None:
    (old / MANIFEST_NAME).unlink()
    with pytest.raises(DatasetNotSealed):
        upgrade(old)


def test_merge_takes_both_formats(old: Path, tmp_path: Path) -> None:
    new = upgrade(shutil.copytree(old, tmp_path / "new"))
    before = open_dataset(old)
    for roots in ([old, tmp_path / "new"], [tmp_path / "new", old]):
        merged = merge(roots, tmp_path / f"merged-{roots[0].name}", progress=False)
        assert merged.header.format_version == 2
        assert_equal_rows(list(merged.rows()), [*before.rows(), *new.rows()])
        assert verify(merged.store.url, deep=True, progress=False) == []


def test_what_is_derived_from_format_1_has_format_2(old: Path, tmp_path: Path) -> None:
    before = open_dataset(old)
    part = subset(old, tmp_path / "part", rows="1:4", progress=False)
    parts = split(old, tmp_path / "parts", parts={"train": 0.5, "test": 0.5}, progress=False)
    for dataset in (part, *parts.values()):
        assert dataset.header.format_version == 2
        assert verify(dataset.store.url, deep=True, progress=False) == []
    assert_equal_rows(list(part.rows()), list(before.rows())[1:4])
    assert sum(map(len, parts.values())) == len(before)
