"""Laws of reading and verifying a sealed dataset: every damage is an error that names the file."""

from __future__ import annotations

import gc
import json
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.commits import Reject, commit_name, commit_unit
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import (
    CommitDamaged,
    FileDamaged,
    InvalidHeader,
    ShardDamaged,
    ShardMissing,
    UnsupportedFormat,
)
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.plan import Unit, plan_from_bytes, plan_to_bytes
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import fingerprint
from coldstill.tools.verify import verify
from tests import making


def test_rows_by_number_by_slice_and_by_shard_are_the_same(tiny_dataset: Path) -> None:
    dataset = open_dataset(tiny_dataset)
    assert len(dataset) == 24
    by_shard = [row.sample_id for shard in range(3) for row in dataset.read_shard(shard)]
    assert [dataset.row(i).sample_id for i in range(24)] == by_shard
    assert [row.sample_id for row in dataset.rows(5, 19)] == by_shard[5:19]
    for index in (-1, 24):
        with pytest.raises(IndexError):
            dataset.row(index)


class CountingStore(Store):
    """Counts the shards that are opened."""

    opened = 0

    def open(self, name: str) -> BinaryIO:
        self.opened += name.startswith("shards/")
        return super().open(name)


def test_rows_of_one_shard_open_it_once_and_few_shards_stay_open(tmp_path: Path, tokenizer_folder: Path) -> None:
    rng = np.random.default_rng(3)
    shards = [[making.random_row(rng, f"row-{shard}-{i}") for i in range(2)] for shard in range(10)]
    making.write_dataset(
        tmp_path / "dataset", shards, header=making.tiny_header(tokenizer_folder), tokenizer=tokenizer_folder
    )
    dataset = Dataset(store := CountingStore(tmp_path / "dataset"))
    for index in (0, 1, 0, 2, 1, 3):
        dataset.row(index)
    assert store.opened == 2
    for index in range(20):
        dataset.row(index)
    assert store.opened == 10
    dataset.row(19)
    assert store.opened == 10, "the last eight shards are open"
    dataset.row(0)
    assert store.opened == 11, "the first one was closed"


def test_open_shards_and_their_row_groups_are_released_with_their_dataset(tiny_dataset: Path) -> None:
    """At once, not when Python next looks for cycles: each holds megabytes."""
    gc.disable()
    try:
        dataset = open_dataset(tiny_dataset)
        for index in range(len(dataset)):
            dataset.row(index)
        shards = [weakref.ref(shard) for shard in dataset._open_shards.values()]
        groups = [weakref.ref(group) for shard in shards for group in shard()._batches.values()]  # type: ignore[union-attr]
        assert len(shards) == len(groups) == 3
        del dataset
        assert [reference() for reference in (*shards, *groups)] == [None] * 6
    finally:
        gc.enable()


def test_a_copy_in_another_place_is_the_same_dataset(tiny_dataset: Path) -> None:
    moved = tiny_dataset.rename(tiny_dataset.parent / "moved")
    assert verify(moved, deep=True, progress=False) == []


def test_a_sound_dataset_has_no_findings(tiny_dataset: Path) -> None:
    assert verify(tiny_dataset, progress=False) == []
    assert verify(tiny_dataset, deep=True, progress=False) == []


@pytest.mark.parametrize(
    ("change", "where", "error"),
    [
        ({}, "", ""),
        ({"rejected": 3}, "rejects/000000-", "FileDamaged"),
        ({"rejected": 3, "rejects": None}, "rejects", "FileMissing"),
    ],
)
def test_rejects_are_as_many_as_their_unit_counts(
    tmp_path: Path, tokenizer_folder: Path, change: dict[str, Any], where: str, error: str, capsys: Any
) -> None:
    header, rows = making.tiny_header(tokenizer_folder), making.random_rows(4)
    store = making.begin_dataset(tmp_path / "dataset", header, tokenizer_folder, [4 + change.get("rejected", 2)])
    rejects = [Reject(4, "one", "no_targets", "a line\u2028and\nanother"), Reject(5, "two", "no_targets", "")]
    record = commit_unit(store, 0, rows=rows, rejects=rejects, header=header, environment={})
    store.put(commit_name(0), record.model_copy(update=change).to_bytes())
    seal(store)
    found = verify(store.url)
    assert [(finding.where.startswith(where), finding.error) for finding in found] == ([(True, error)] if error else [])
    assert ("1 finding" in capsys.readouterr().err) == bool(error)


def _shard(root: Path) -> Path:
    return sorted((root / "shards").iterdir())[1]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip])
def test_a_damaged_shard_is_named_at_reading_and_by_verify(tiny_dataset: Path, damage: Callable[[Path], None]) -> None:
    path = _shard(tiny_dataset)
    damage(path)
    with pytest.raises(ShardDamaged, match=path.name):
        open_dataset(tiny_dataset).read_shard(1)
    assert [(finding.where, finding.error) for finding in verify(tiny_dataset, progress=False)] == [
        (f"shards/{path.name}", "ShardDamaged")
    ]


def test_a_missing_shard_is_named(tiny_dataset: Path) -> None:
    path = _shard(tiny_dataset)
    path.unlink()
    with pytest.raises(ShardMissing, match=path.name):
        open_dataset(tiny_dataset).read_shard(1)
    assert [finding.error for finding in verify(tiny_dataset, deep=True, progress=False)] == ["ShardMissing"]


def test_shards_swapped_between_units_are_named(tiny_dataset: Path) -> None:
    first, second, _ = sorted((tiny_dataset / "shards").iterdir())
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert [finding.error for finding in verify(tiny_dataset, progress=False)] == ["ShardDamaged", "ShardDamaged"]


def test_another_tokenizer_inside_is_named(tiny_dataset: Path) -> None:
    path = tiny_dataset / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"!"', '"?!"'))
    assert [finding.error for finding in verify(tiny_dataset, progress=False)] == ["FileDamaged"]


def test_a_changed_header_is_named(tiny_dataset: Path) -> None:
    path = tiny_dataset / "dataset.json"
    path.write_text(path.read_text().replace('"top_k": 8', '"top_k": 9'))
    with pytest.raises(FileDamaged, match=r"dataset\.json"):
        open_dataset(tiny_dataset)


def test_a_manifest_that_points_outside_is_refused_before_anything_is_opened(tiny_dataset: Path) -> None:
    path = tiny_dataset / "manifest.json"
    document = json.loads(path.read_text())
    document["shards"][0]["file"]["name"] = "../../etc/passwd"
    path.write_text(json.dumps(document))
    with pytest.raises(CommitDamaged, match="inside the dataset"):
        open_dataset(tiny_dataset)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\x80\x04pickle"])
def test_a_damaged_manifest_has_a_name(tiny_dataset: Path, data: bytes) -> None:
    (tiny_dataset / "manifest.json").write_bytes(data)
    with pytest.raises(CommitDamaged, match=r"manifest\.json"):
        open_dataset(tiny_dataset)


def test_a_later_format_is_refused_by_its_number(tokenizer_folder: Path) -> None:
    document = json.loads(making.tiny_header(tokenizer_folder).to_bytes())
    with pytest.raises(UnsupportedFormat, match="format_version"):
        DatasetHeader.from_bytes(json.dumps({**document, "format_version": 7}).encode(), where="x")


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 0), ("top_k", 65), ("vocab_size", 3), ("token_count", 1 << 21), ("codec", "pickle"), ("about", [])],
)
def test_a_header_field_out_of_bounds_is_named(tokenizer_folder: Path, field: str, value: object) -> None:
    document = json.loads(making.tiny_header(tokenizer_folder).to_bytes())
    with pytest.raises(InvalidHeader, match="x: "):
        DatasetHeader.from_bytes(json.dumps({**document, field: value}).encode(), where="x")


def test_a_header_of_a_gigabyte_is_not_parsed() -> None:
    with pytest.raises(InvalidHeader, match="size"):
        DatasetHeader.from_bytes(b" " * (2 << 20), where="x")


def test_a_plan_gives_back_its_units() -> None:
    units = [Unit(0, 0, 0, 5), Unit(1, 321, 5, 2)]
    assert plan_from_bytes(plan_to_bytes(units), where="x") == units
    with pytest.raises(CommitDamaged, match="x"):
        plan_from_bytes(b"PAR1", where="x")


def test_the_fingerprint_is_of_meaning_not_of_layout(tokenizer_folder: Path, tmp_path: Path) -> None:
    document = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    same = tmp_path / "same"
    same.mkdir()
    (same / "tokenizer.json").write_text(json.dumps({**document, "truncation": {"max_length": 3}}, indent=7))
    assert fingerprint(same) == fingerprint(tokenizer_folder)
    document["model"]["vocab"]["!"], document["model"]["vocab"]["#"] = 3, 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(document))
    assert fingerprint(other).fingerprint != fingerprint(tokenizer_folder).fingerprint


@pytest.mark.parametrize("text", [None, "", "[]", '{"model": {}}', '{"model": {"vocab": {"a": "b"}}}'])
def test_a_folder_without_a_readable_tokenizer_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ColdstillError, match=r"tokenizer\.json"):
        fingerprint(tmp_path)


def test_a_dataset_of_ten_thousand_shards_opens_without_touching_one(
    tmp_path: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but manifest and header is read, in tens of megabytes; a row costs its own shard."""
    manifest = open_dataset(tiny_dataset).manifest
    first = manifest.shards[0]
    many = 10_000
    shards = [
        first.model_copy(
            update={
                "unit": unit,
                "file": first.file.model_copy(update={"name": f"shards/{unit:06d}-{first.file.sha256[:12]}.parquet"}),
            }
        )
        for unit in range(many)
    ]
    totals = {name: many * getattr(first, name) for name in ("rows", "tokens", "targets", "rejected")}
    large = manifest.model_copy(update={"shards": tuple(shards), **totals})
    (tiny_dataset / "manifest.json").write_bytes(large.to_bytes())
    last = tiny_dataset / shards[-1].file.name
    (tiny_dataset / first.file.name).rename(last)

    read: list[str] = []
    reading = Store.read
    monkeypatch.setattr(
        Store, "read", lambda self, name, **options: read.append(name) or reading(self, name, **options)
    )
    tracemalloc.start()
    dataset = open_dataset(tiny_dataset)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == ["manifest.json", "dataset.json"]
    assert peak < 64 << 20
    assert len(dataset) == 8 * many
    assert dataset.row(len(dataset) - 1).sample_id == "row-0-7"
    assert read == ["manifest.json", "dataset.json"]
    with pytest.raises(ShardMissing):
        dataset.row(0)


def test_a_name_that_no_file_system_takes_is_refused_before_anything_is_opened(tiny_dataset: Path) -> None:
    path = tiny_dataset / "manifest.json"
    document = json.loads(path.read_text())
    document["files"][0]["name"] = "media/" + "a" * 5000
    path.write_text(json.dumps(document))
    with pytest.raises(CommitDamaged, match=r"files\.0\.name"):
        open_dataset(tiny_dataset)
