"""What merge, split and subset share: they resume, and leave the output of other requests alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coldstill.storage_schema.commits import commit_name, committed_units
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import CommitDamaged, HeaderMismatch, UnsupportedStore
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import About
from coldstill.storage_schema.plan import PLAN_NAME, Unit, plan_to_bytes
from coldstill.storage_schema.store import Store
from coldstill.tools.derive import deriving
from coldstill.tools.derive.merge import merge
from coldstill.tools.derive.split import split
from coldstill.tools.derive.subset import subset
from coldstill.tools.errors import OutputNotApart, OutputTaken
from tests import making
from tests.tools.derive.parts import rich_dataset, tree

LAW = ["metadata.topic == law"]


@pytest.fixture
def small(tmp_path: Path, header: DatasetHeader, tokenizer_folder: Path) -> Dataset:
    return rich_dataset(tmp_path / "small", header, tokenizer_folder, shards=(4, 3, 4), seed=5, image=b"dog")


@pytest.fixture
def smaller(tmp_path: Path, header: DatasetHeader, tokenizer_folder: Path) -> Dataset:
    """Of another source: merged with it, shards are written anew."""
    other = header.model_copy(update={"source_sha256": "1" * 64})
    return rich_dataset(tmp_path / "smaller", other, tokenizer_folder, shards=(2,), seed=6, image=b"cow")


class _Killed(BaseException):
    """Nothing catches it."""


class _DyingStore(Store):
    """A store whose process dies at its write number `left`, before or after it."""

    left = -1
    after = False

    def put(self, name: str, data: bytes) -> None:
        self._write(lambda: super(_DyingStore, self).put(name, data))

    def create(self, name: str, data: bytes) -> bool:
        created: list[bool] = []
        self._write(lambda: created.append(super(_DyingStore, self).create(name, data)))
        return created[0]

    @classmethod
    def _write(cls, write: Callable[[], object]) -> None:
        if cls.left == 0 and not cls.after:
            raise _Killed
        write()
        if cls.left == 0:
            raise _Killed
        cls.left -= 1


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("command", ["merge", "subset", "split"])
def test_an_interrupted_derivation_equals_an_unbroken_one(
    source: Dataset,
    small: Dataset,
    smaller: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    after: bool,
) -> None:
    def run(place: Path) -> None:
        if command == "merge":
            merge([small.store.url, smaller.store.url], place, progress=False)
        elif command == "subset":
            subset(source.store.url, place, filters=LAW, limit=15, progress=False)
        else:
            split(small.store.url, place, parts={"train": 0.5, "test": 0.5}, progress=False)

    run(tmp_path / "unbroken")
    wanted = tree(tmp_path / "unbroken")
    monkeypatch.setattr(deriving, "Store", _DyingStore)
    monkeypatch.setattr(_DyingStore, "after", after)
    for write in range(200):
        monkeypatch.setattr(_DyingStore, "left", write)
        try:
            run(tmp_path / "broken")
        except _Killed:
            monkeypatch.setattr(_DyingStore, "left", -1)
            run(tmp_path / "broken")
            assert tree(tmp_path / "broken") == wanted
            shutil.rmtree(tmp_path / "broken")
        else:
            break
    else:
        raise AssertionError("no run was unbroken")
    assert write > 10
    assert tree(tmp_path / "broken") == wanted


def test_a_merge_that_is_killed_resumes_with_what_is_missing(source: Dataset, small: Dataset, tmp_path: Path) -> None:
    program = f"""
import os, signal
from coldstill.storage_schema.store import Store
from coldstill.tools.derive.merge import merge
create = Store.create
def dying(self, name, data):
    if name == {commit_name(5)!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return create(self, name, data)
Store.create = dying
merge([{small.store.url!r}, {source.store.url!r}], {str(tmp_path / "merged")!r}, progress=False)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == -signal.SIGKILL
    store = Store(tmp_path / "merged")
    assert committed_units(store) == set(range(5))
    written = {unit: os.stat(store.path(commit_name(unit))).st_mtime_ns for unit in range(5)}
    merged = merge([small.store.url, source.store.url], tmp_path / "merged", progress=False)
    unbroken = merge([small.store.url, source.store.url], tmp_path / "unbroken", progress=False)
    assert merged.dataset_id == unbroken.dataset_id
    assert {unit: os.stat(store.path(commit_name(unit))).st_mtime_ns for unit in range(5)} == written


def test_doing_it_again_changes_nothing(source: Dataset, tmp_path: Path) -> None:
    first = subset(source.store.url, tmp_path / "subset", filters=LAW, progress=False)
    before = tree(tmp_path / "subset")
    again = subset(source.store.url, tmp_path / "subset", filters=[" metadata.topic == law "], progress=False)
    assert again.dataset_id == first.dataset_id
    assert tree(tmp_path / "subset") == before


@pytest.mark.parametrize("sealed", [True, False])
def test_a_changed_request_names_what_differs(
    source: Dataset, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    place = tmp_path / "out"
    if not sealed:
        monkeypatch.setattr(deriving, "Store", _DyingStore)
        monkeypatch.setattr(_DyingStore, "left", 6)
        with pytest.raises(_Killed):
            subset(source.store.url, place, filters=LAW, progress=False)
        monkeypatch.setattr(_DyingStore, "left", -1)
    else:
        subset(source.store.url, place, filters=LAW, progress=False)
    before = tree(place)
    for change, again in (
        ("filters", lambda: subset(source.store.url, place, filters=["tokens > 3"], progress=False)),
        ("rows", lambda: subset(source.store.url, place, filters=LAW, rows="1:", progress=False)),
        ("limit", lambda: subset(source.store.url, place, filters=LAW, limit=3, progress=False)),
        ("sources", lambda: subset(small.store.url, place, filters=LAW, progress=False)),
        ("command", lambda: merge([source.store.url], place, progress=False)),
    ):
        with pytest.raises(OutputTaken, match=rf"out: {change}\n"):
            again()
    assert tree(place) == before


def test_another_header_on_a_begun_output_names_the_field(
    source: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deriving, "Store", _DyingStore)
    monkeypatch.setattr(_DyingStore, "left", 6)
    with pytest.raises(_Killed):
        subset(source.store.url, tmp_path / "out", filters=LAW, progress=False)
    monkeypatch.setattr(_DyingStore, "left", -1)
    changed = source.header.model_copy(update={"about": About(license="MIT")})
    (tmp_path / "out" / "dataset.json").write_bytes(changed.to_bytes())
    with pytest.raises(HeaderMismatch, match=r"about\.license"):
        subset(source.store.url, tmp_path / "out", filters=LAW, progress=False)


def test_a_plan_of_other_sources_has_a_name(source: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deriving, "Store", _DyingStore)
    for plan in ([Unit(0, 99, 0, 3)], [Unit(0, 7, 60, 3)]):
        place = tmp_path / str(plan[0].start)
        monkeypatch.setattr(_DyingStore, "left", 3)
        with pytest.raises(_Killed):
            subset(source.store.url, place, progress=False)
        monkeypatch.setattr(_DyingStore, "left", -1)
        (place / PLAN_NAME).write_bytes(plan_to_bytes(plan))
        with pytest.raises(CommitDamaged, match=r"plan\.parquet: unit 0"):
            subset(source.store.url, place, progress=False)


def test_a_request_that_is_no_json_has_a_name(source: Dataset, tmp_path: Path) -> None:
    (tmp_path / "out" / "_run").mkdir(parents=True)
    (tmp_path / "out" / deriving.REQUEST_NAME).write_bytes(b"{")
    with pytest.raises(CommitDamaged, match=r"derivation\.json"):
        subset(source.store.url, tmp_path / "out", progress=False)


def test_outputs_of_others_are_left_alone(
    source: Dataset, small: Dataset, tiny_dataset: Path, header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path
) -> None:
    making.begin_dataset(tmp_path / "capture", header, tokenizer_folder, [2])
    (tmp_path / "photos" / "media").mkdir(parents=True)
    (tmp_path / "photos" / "media" / "holiday.png").write_bytes(b"mine")
    before = tree(tmp_path)
    for place in (tiny_dataset, Path(small.store.url), tmp_path / "capture", tmp_path / "photos"):
        with pytest.raises(OutputTaken):
            subset(source.store.url, place, filters=LAW, progress=False)
    assert tree(tmp_path) == before


def test_a_copy_without_commit_records_is_left_alone(source: Dataset, tmp_path: Path) -> None:
    subset(source.store.url, tmp_path / "out", filters=LAW, progress=False)
    shutil.rmtree(tmp_path / "out" / "commits")
    with pytest.raises(OutputTaken, match="not made here"):
        subset(source.store.url, tmp_path / "out", filters=LAW, progress=False)


def test_an_output_in_or_around_a_source_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_dataset)
    before = tree(tiny_dataset)
    for place in (tiny_dataset, tiny_dataset / "media", tiny_dataset.parent, tmp_path / "link" / "new"):
        with pytest.raises(OutputNotApart, match="choose another output"):
            subset(tiny_dataset, place, progress=False)
    assert tree(tiny_dataset) == before
    beside = f"{tiny_dataset} 2"
    assert len(subset(tiny_dataset, beside, progress=False)) == len(open_dataset(tiny_dataset))


def test_an_output_that_cannot_be_written_is_refused(source: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", "https://example.org/dataset"):
        with pytest.raises(UnsupportedStore):
            subset(source.store.url, place, progress=False)


def test_commit_records_say_what_was_asked_for(source: Dataset, tmp_path: Path) -> None:
    subset(source.store.url, tmp_path / "out", filters=LAW, rows="3:", progress=False)
    record = json.loads((tmp_path / "out" / commit_name(0)).read_bytes())
    options = {"filters": LAW, "rows": [3, 61], "limit": None}
    assert record["environment"]["derivation"] == {"command": "subset", "options": options}
