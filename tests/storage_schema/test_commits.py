"""Laws of the commit protocol: the first record wins, and a file that no record names is not part of the dataset."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from coldstill.common.files import PAGE_NAME, RUN_NAME
from coldstill.pipeline.driver.status import read_status
from coldstill.storage_schema.commits import (
    CommitRecord,
    Reject,
    commit_name,
    commit_unit,
    committed_units,
    read_commit,
)
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import CommitDamaged, DatasetNotFound, DatasetNotSealed, UnitsMissing
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import RUN_FOLDER, Store
from tests import making


@pytest.fixture(scope="module")
def header(tokenizer_folder: Path) -> DatasetHeader:
    return making.tiny_header(tokenizer_folder)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, header: DatasetHeader, tokenizer_folder: Path) -> Store:
    root = str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}"
    return making.begin_dataset(root, header, tokenizer_folder, [2, 2])


def _rows(seed: int) -> list[CachedRow]:
    rng = np.random.default_rng(seed)
    return [making.random_row(rng, f"{seed}-{i}") for i in range(2)]


def _commit(
    store: Store, header: DatasetHeader, unit: int, seed: int, rejects: list[Reject] | None = None
) -> CommitRecord:
    return commit_unit(store, unit, rows=_rows(seed), rejects=rejects or [], header=header, environment={"n": seed})


def test_the_first_commit_of_a_unit_wins_and_the_loser_leaves_nothing(store: Store, header: DatasetHeader) -> None:
    reject = Reject(1, "b", "over_long", "9 tokens")
    first = _commit(store, header, 0, seed=1)
    zombie = _commit(store, header, 0, seed=2, rejects=[reject])
    assert zombie == first == read_commit(store, 0)
    assert store.names("shards") == [first.shard.name.removeprefix("shards/")]
    assert store.names("rejects") == []


def test_equal_attempts_share_their_shard(store: Store, header: DatasetHeader) -> None:
    first, second = _commit(store, header, 0, seed=1), _commit(store, header, 0, seed=1)
    assert first == second
    assert store.exists(first.shard.name)


def test_of_racing_workers_one_commits(store: Store, header: DatasetHeader) -> None:
    with ThreadPoolExecutor(4) as threads:
        records = list(threads.map(lambda seed: _commit(store, header, 0, seed), range(8)))
    assert len({record.shard.sha256 for record in records}) == 1
    assert store.names("shards") == [records[0].shard.name.removeprefix("shards/")]


def test_a_shard_without_a_record_is_not_done_and_goes_at_sealing(store: Store, header: DatasetHeader) -> None:
    store.put("shards/000001-aaaaaaaaaaaa.parquet", b"written by a worker that was killed before its record")
    assert committed_units(store) == set()
    for unit in range(2):
        _commit(store, header, unit, seed=unit)
    manifest = seal(store)
    assert store.names("shards") == sorted(shard.file.name.removeprefix("shards/") for shard in manifest.shards)
    assert not store.exists(RUN_FOLDER)


def test_sealing_refuses_while_a_unit_is_missing(store: Store, header: DatasetHeader) -> None:
    _commit(store, header, 1, seed=1)
    with pytest.raises(UnitsMissing, match="1 of 2 not committed, the first is 0"):
        seal(store)
    assert not store.exists(MANIFEST_NAME)


def test_equal_captures_have_equal_ids_in_any_order_of_commits(
    tmp_path: Path, header: DatasetHeader, tokenizer_folder: Path
) -> None:
    ids = []
    for order in ([0, 1], [1, 0]):
        store = making.begin_dataset(tmp_path / str(order), header, tokenizer_folder, [2, 2])
        for unit in order:
            _commit(store, header, unit, seed=unit)
        seal(store)
        ids.append(open_dataset(store.url).dataset_id)
    assert ids[0] == ids[1]


def test_sealing_twice_changes_nothing(store: Store, header: DatasetHeader) -> None:
    for unit in range(2):
        _commit(store, header, unit, seed=unit)
    first = seal(store)
    assert seal(store) == first


def test_rejects_are_kept_with_their_reason(store: Store, header: DatasetHeader) -> None:
    record = _commit(store, header, 0, seed=1, rejects=[Reject(7, "b", "over_long", "9 tokens ü")])
    assert record.rejects is not None
    line = json.loads(store.read(record.rejects.name))
    assert line == {"source_row": 7, "sample_id": "b", "reason": "over_long", "detail": "9 tokens ü"}


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"\xff", b'{"unit": -1}'])
def test_a_damaged_record_has_a_name(store: Store, header: DatasetHeader, data: bytes) -> None:
    store.put(commit_name(0), data)
    with pytest.raises(CommitDamaged, match=r"000000\.json"):
        read_commit(store, 0)


def test_a_record_of_another_unit_has_a_name(store: Store, header: DatasetHeader) -> None:
    _commit(store, header, 0, seed=1)
    store.put(commit_name(1), store.read(commit_name(0)))
    with pytest.raises(CommitDamaged, match="unit"):
        read_commit(store, 1)


def test_an_unsealed_dataset_is_not_opened(store: Store) -> None:
    with pytest.raises(DatasetNotSealed, match="sealed"):
        open_dataset(store.url)


def test_a_folder_that_is_no_dataset_is_not_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DatasetNotFound, match="check the path"):
            open_dataset(path)


def test_a_path_without_a_dataset_is_refused_with_what_lies_there_and_where_a_dataset_is(
    tmp_path: Path, tiny_dataset: Path
) -> None:
    training = tmp_path / "run"
    training.mkdir()
    for name in (RUN_NAME, PAGE_NAME):
        (training / name).touch()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x\x1b[31m").touch()
    for path, found, fix in (
        (tmp_path / "absent", "no such folder", "check the path"),
        (tmp_path / "file", "a file", "check the path"),
        (tmp_path / "other", "a folder with x", "check the path"),
        (training, f"a folder with {PAGE_NAME}, {RUN_NAME}", f"see its {PAGE_NAME}"),
        (tiny_dataset.parent, "a folder with", f"did you mean {tiny_dataset}?"),
        (tiny_dataset / "shards", "a folder with", "check the path"),
    ):
        for read in (open_dataset, read_status):
            with pytest.raises(DatasetNotFound) as error:
                read(str(path))
            assert error.value.found.startswith(found)
            assert fix in error.value.fix
            assert "\x1b" not in str(error.value)
