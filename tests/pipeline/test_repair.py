"""Laws of lost and damaged files: a unit without all its files is not done, and only such units are made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from coldstill.pipeline.capture import CaptureSummary, capture
from coldstill.pipeline.cluster import pool
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.worker import CaptureWorker
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import FileMissing, InvalidHeader, UnitsMissing
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import MANIFEST_NAME, read_manifest, seal
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.verified_files import file_record
from coldstill.tools.pull import pull
from coldstill.tools.verify import verify
from tests.pipeline.buckets import s3_bucket
from tests.pipeline.capturing import OneWorkerPool, capture_config, do_units

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> CaptureConfig:
    """A capture whose units are all committed, and that is not sealed."""
    config = capture_config(tmp_path_factory.mktemp("capture"), calibration_targets=0)
    prepare(config)
    do_units(config)
    return config


@pytest.fixture(scope="module")
def made(committed: CaptureConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[CaptureConfig, CaptureSummary]:
    """The same, sealed."""
    config = copy_of(committed, tmp_path_factory.mktemp("made") / "dataset")
    return config, capture(config)


def copy_of(config: CaptureConfig, output: Path) -> CaptureConfig:
    shutil.copytree(config.output, output)
    return config.model_copy(update={"output": str(output)})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units that a worker of this test has made, in order."""
    units: list[int] = []
    real = CaptureWorker.run

    def watched(worker: CaptureWorker, index: int, *rest: object) -> object:
        units.append(index)
        return real(worker, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CaptureWorker, "run", watched)
    monkeypatch.setattr(pool, "WorkerPool", OneWorkerPool)
    return units


@pytest.fixture
def sealed(made: tuple[CaptureConfig, CaptureSummary], tmp_path: Path) -> CaptureConfig:
    return copy_of(made[0], tmp_path / "dataset")


@pytest.fixture
def unsealed(committed: CaptureConfig, tmp_path: Path) -> CaptureConfig:
    return copy_of(committed, tmp_path / "dataset")


def one(root: Path, pattern: str) -> Path:
    (found,) = root.glob(pattern)
    return found


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


LOST_WHILE_RUNNING: dict[str, tuple[Damage, list[int]]] = {
    "a shard is gone": (lambda root: one(root, "shards/000001-*").unlink(), [1]),
    "a shard is cut": (lambda root: cut(one(root, "shards/000002-*")), [2]),
    "the rejects are gone": (lambda root: one(root, "rejects/000004-*").unlink(), [4]),
    "the rejects are cut": (lambda root: cut(one(root, "rejects/000004-*")), [4]),
    "a share of the sample is gone": (lambda root: one(root, "faithfulness/000003-*").unlink(), [3]),
    "a share of the sample has other bytes": (lambda root: flip(one(root, "faithfulness/000003-*")), [3]),
    "a commit record is damaged": (lambda root: one(root, "commits/000000.json").write_bytes(b"{"), [0]),
    "all shards are gone": (lambda root: shutil.rmtree(root / "shards"), [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", LOST_WHILE_RUNNING)
def test_a_committed_unit_that_lost_a_file_is_made_again_before_sealing(
    made: tuple[CaptureConfig, CaptureSummary], unsealed: CaptureConfig, runs: list[int], name: str
) -> None:
    damage, units = LOST_WHILE_RUNNING[name]
    damage(Path(unsealed.output))
    summary = capture(unsealed)
    assert runs == units
    assert summary.dataset_id == made[1].dataset_id
    assert verify(unsealed.output, deep=True, progress=False) == []


def test_sealing_alone_refuses_and_names_the_units(unsealed: CaptureConfig) -> None:
    """As imports, merges and subsets seal."""
    one(Path(unsealed.output), "shards/000001-*").unlink()
    with pytest.raises(UnitsMissing, match="1 whose files are gone or damaged, the first is 1") as refused:
        seal(Store(unsealed.output))
    assert "re-run the same command" in refused.value.fix
    assert not Store(unsealed.output).exists(MANIFEST_NAME)


def test_a_shard_that_is_lost_at_each_sealing_ends_the_capture_by_name(
    unsealed: CaptureConfig, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.put

    def losing(store: Store, name: str, data: bytes) -> None:
        if not name.startswith("shards/000001"):
            real(store, name, data)

    one(Path(unsealed.output), "shards/000001-*").unlink()
    monkeypatch.setattr(Store, "put", losing)
    with pytest.raises(UnitsMissing, match="the first is 1"):
        capture(unsealed)
    assert runs == [1, 1, 1]


SEALED_DAMAGE: dict[str, tuple[Damage, list[int]]] = {
    "a shard is gone": (lambda root: one(root, "shards/000001-*").unlink(), [1]),
    "a shard is cut": (lambda root: cut(one(root, "shards/000002-*")), [2]),
    "the rejects are gone": (lambda root: one(root, "rejects/000004-*").unlink(), [4]),
    "the header is gone": (lambda root: (root / HEADER_NAME).unlink(), []),
    "the header is cut": (lambda root: cut(root / HEADER_NAME), []),
    "the plan is gone": (lambda root: (root / "plan.parquet").unlink(), []),
    "the plan is cut": (lambda root: cut(root / "plan.parquet"), []),
    "the tokenizer is cut": (lambda root: cut(root / "tokenizer/tokenizer.json"), []),
    "the manifest is damaged": (lambda root: cut(root / MANIFEST_NAME), []),
    "two shards and the header": (
        lambda root: [
            one(root, "shards/000001-*").unlink(),
            cut(one(root, "shards/000000-*")),
            (root / HEADER_NAME).unlink(),
        ],
        [0, 1],
    ),
}


@pytest.mark.parametrize("name", SEALED_DAMAGE)
def test_the_capture_repairs_its_sealed_dataset_under_the_same_id(
    made: tuple[CaptureConfig, CaptureSummary], sealed: CaptureConfig, runs: list[int], name: str
) -> None:
    damage, units = SEALED_DAMAGE[name]
    damage(Path(sealed.output))
    summary = capture(sealed)
    assert runs == units
    assert summary.dataset_id == made[1].dataset_id
    assert summary.repaired is not None
    assert verify(sealed.output, deep=True, progress=False) == []
    assert capture(sealed).repaired is None
    assert runs == units


def test_a_copy_without_commit_records_is_repaired_too(
    made: tuple[CaptureConfig, CaptureSummary], sealed: CaptureConfig, runs: list[int], tmp_path: Path
) -> None:
    pull(sealed.output, tmp_path / "copy", progress=False)
    copy = sealed.model_copy(update={"output": str(tmp_path / "copy")})
    assert not (tmp_path / "copy/commits").exists()
    one(tmp_path / "copy", "shards/000003-*").unlink()
    assert capture(copy).dataset_id == made[1].dataset_id
    assert runs == [3]
    assert verify(copy.output, deep=True, progress=False) == []


def test_damage_that_sizes_do_not_show_is_repaired_on_request(
    made: tuple[CaptureConfig, CaptureSummary], sealed: CaptureConfig, runs: list[int]
) -> None:
    flip(one(Path(sealed.output), "shards/000002-*"))
    assert capture(sealed).repaired is None, "sizes alone do not show it"
    (finding,) = verify(sealed.output, progress=False)
    assert finding.error == "ShardDamaged"
    assert "--repair" in finding.message
    summary = capture(sealed, repair=True)
    assert (runs, summary.dataset_id) == ([2], made[1].dataset_id)
    assert verify(sealed.output, deep=True, progress=False) == []


def test_damage_that_sizes_do_not_show_is_found_on_request_before_sealing(
    made: tuple[CaptureConfig, CaptureSummary], unsealed: CaptureConfig, runs: list[int]
) -> None:
    flip(one(Path(unsealed.output), "shards/000002-*"))
    assert capture(unsealed, repair=True).dataset_id == made[1].dataset_id
    assert runs == [2]


def test_an_intact_sealed_dataset_costs_one_listing_of_each_folder_and_no_shard_is_read(
    sealed: CaptureConfig, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    read: list[str] = []
    sizes, reads = Store.sizes, Store.read
    monkeypatch.setattr(Store, "sizes", lambda store, folder: listed.append(folder) or sizes(store, folder))
    monkeypatch.setattr(Store, "read", lambda store, name, **more: read.append(name) or reads(store, name, **more))
    capture(sealed)
    assert sorted(listed) == ["rejects", "shards", "tokenizer"]
    assert not [name for name in read if name.startswith(("shards/", "commits/"))]
    assert runs == []


def test_a_repair_that_is_killed_at_any_write_is_ended_by_the_next(
    made: tuple[CaptureConfig, CaptureSummary], sealed: CaptureConfig, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def damaged(root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(made[0].output, root)
        one(root, "shards/000001-*").unlink()
        flip(one(root, "shards/000002-*"))

    for kill in range(0, 60, 7):
        damaged(Path(sealed.output))
        left = kill
        with monkeypatch.context() as patch:

            def counted(real: Callable[..., object]) -> Callable[..., object]:
                def call(*arguments: object, **more: object) -> object:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise Killed
                    return real(*arguments, **more)

                return call

            for method in ("put", "create", "delete"):
                patch.setattr(Store, method, counted(getattr(Store, method)))
            try:
                capture(sealed, repair=True)
                is_over = True
            except Killed:
                is_over = False
        for lease in Path(sealed.output).glob("lease.json"):
            lease.unlink()
        assert capture(sealed, repair=True).dataset_id == made[1].dataset_id
        assert verify(sealed.output, deep=True, progress=False) == []
        if is_over:
            break
    assert is_over


def test_a_lost_sample_leaves_the_units_as_they_are(sealed: CaptureConfig, runs: list[int]) -> None:
    root = Path(sealed.output)
    (root / "faithfulness.parquet").unlink()
    capture(sealed)
    assert runs == []
    assert verify(root, deep=True, progress=False) == []
    one(root, "shards/000001-*").unlink()
    capture(sealed)
    assert runs == [1]


def test_a_lost_file_that_no_capture_writes_is_named(sealed: CaptureConfig, runs: list[int]) -> None:
    store = Store(sealed.output)
    manifest, _ = read_manifest(store)  # as an earlier release sealed it, which listed files that no row names
    files = (*manifest.files, file_record("media/picture.png", b"picture"))
    store.put(MANIFEST_NAME, manifest.model_copy(update={"files": files}).to_bytes())
    with pytest.raises(FileMissing, match=r"media/picture\.png") as lost:
        capture(sealed)
    assert "copy it again" in lost.value.fix
    assert store.exists(MANIFEST_NAME)


def test_a_header_that_is_gone_is_taken_from_a_shard_and_never_made_anew(
    made: tuple[CaptureConfig, CaptureSummary], unsealed: CaptureConfig, runs: list[int]
) -> None:
    header = Path(unsealed.output, HEADER_NAME)
    before = header.read_bytes()
    header.unlink()
    one(Path(unsealed.output), "shards/000000-*").write_bytes(b"")
    assert capture(unsealed).dataset_id == made[1].dataset_id
    assert header.read_bytes() == before
    assert runs == [0]


def test_a_header_that_no_shard_holds_is_named(unsealed: CaptureConfig, runs: list[int]) -> None:
    Path(unsealed.output, HEADER_NAME).write_text("{}")
    for shard in Path(unsealed.output, "shards").iterdir():
        shard.write_bytes(b"PAR1")
    with pytest.raises(InvalidHeader, match="no readable header") as refused:
        capture(unsealed)
    assert "capture again" in refused.value.fix


def test_a_dataset_on_s3_is_repaired(
    made: tuple[CaptureConfig, CaptureSummary], runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_bucket(monkeypatch) as (url, _):
        config = made[0].model_copy(update={"output": f"{url}/dataset"})
        store = Store(config.output)
        for path in Path(made[0].output).rglob("*"):
            if path.is_file():
                store.put(path.relative_to(made[0].output).as_posix(), path.read_bytes())
        store.delete(f"shards/{one(Path(made[0].output), 'shards/000001-*').name}")
        store.put(f"shards/{one(Path(made[0].output), 'shards/000003-*').name}", b"cut")
        assert capture(config).dataset_id == made[1].dataset_id
        assert runs == [1, 3]
        assert open_dataset(config.output).row(11).sample_id == open_dataset(made[0].output).row(11).sample_id


@pytest.mark.parametrize("name", ["progress/0123.json", "attempts/000001.json", "_run/last_words/x-worker-0.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]"])
def test_damaged_helper_files_do_not_stop_a_capture(
    made: tuple[CaptureConfig, CaptureSummary], unsealed: CaptureConfig, runs: list[int], name: str, data: bytes
) -> None:
    Store(unsealed.output).put(name, data)
    assert capture(unsealed).dataset_id == made[1].dataset_id
