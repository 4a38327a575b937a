"""Push and pull: equal ids, nothing copied twice, no sealed dataset before the end, no damaged file anywhere.

The Hub's own client uses a stand-in of its HTTP API.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

pytest.importorskip("huggingface_hub")

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import (
    AccessDenied,
    CommitDamaged,
    CredentialsMissing,
    DatasetNotFound,
    DatasetNotSealed,
    FileDamaged,
    FileMissing,
    OutsideDataset,
    ShardDamaged,
    ShardMissing,
    StorageFailed,
    StorageFull,
    StoreNotFound,
    UnsupportedStore,
)
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.plan import PLAN_NAME
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.tools.card_text import CARD_NAME, PLOT_NAME, PREVIEW_NAME
from coldstill.tools.errors import AnotherDataset, CardRefused
from coldstill.tools.pull import dataset_files, pull
from coldstill.tools.push import parse_hub_url, push
from coldstill.tools.verify import verify
from tests.conftest import SmallDisk
from tests.tools.hub_stand_in import Fault, HubStandIn
from tests.tools.transfers import NAME, URL, another_dataset, files_in, names

pytestmark = pytest.mark.usefixtures("quick_plot")
REPOSITORY = Path(__file__).parents[3]
PUSH = """
import sys
from coldstill.tools import push
push.COMMIT_FILES = 1
push.push(sys.argv[1], sys.argv[2], progress=False)
"""


def log_in(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    fsspec.get_filesystem_class("hf").clear_instance_cache()


def test_a_push_and_a_pull_give_an_equal_dataset(hub: HubStandIn, tiny_dataset: Path, tmp_path: Path) -> None:
    (tiny_dataset / CARD_NAME).write_text("---\nlicense: cc0-1.0\n---\n# A card\n")
    (tiny_dataset / "card").mkdir()
    (tiny_dataset / "card" / "stats.png").write_bytes(b"a picture")
    (tiny_dataset / "card" / "draft.png").write_bytes(b"a picture that nobody named")
    (tiny_dataset / RUN_FOLDER).mkdir()
    (tiny_dataset / RUN_FOLDER / "log").write_text("of this machine")
    (tiny_dataset / "notes.txt").write_text("private")
    dataset = open_dataset(tiny_dataset)

    pushed = push(tiny_dataset, URL, progress=False)
    assert pushed == (dataset.dataset_id, len(dataset_files(dataset)), sum(f.bytes for f in dataset_files(dataset)), 0)
    assert hub.repositories[NAME].private
    assert set(hub.repositories[NAME].branches["main"]) == names(dataset) | {CARD_NAME, PLOT_NAME, ".gitattributes"}

    pulled = pull(URL, tmp_path / "copy", progress=False)
    assert pulled == pushed
    assert files_in(tmp_path / "copy") == names(dataset) | {CARD_NAME, PLOT_NAME}
    assert verify(tmp_path / "copy", deep=True, progress=False) == []
    assert open_dataset(tmp_path / "copy").dataset_id == dataset.dataset_id
    assert (tmp_path / "copy" / CARD_NAME).read_bytes() == (tiny_dataset / CARD_NAME).read_bytes()


def test_a_dataset_on_the_hub_is_read_where_it_is(hub: HubStandIn, tiny_dataset: Path) -> None:
    push(tiny_dataset, URL, progress=False)
    remote, local = open_dataset(URL), open_dataset(tiny_dataset)
    assert [row.sample_id for row in remote.rows()] == [row.sample_id for row in local.rows()]
    assert verify(URL, deep=True, progress=False) == []
    name = local.shards[0].file.name
    assert remote.store.size(name) == local.shards[0].file.bytes
    with remote.store.open(name) as file:
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"PAR1"
    for read in (remote.store.read, remote.store.open, remote.store.size):
        with pytest.raises(FileNotFoundError):
            read("shards/absent")
        with pytest.raises(FileNotFoundError):
            read("shards")


def test_the_hub_cannot_be_captured_into(hub: HubStandIn) -> None:
    with pytest.raises(UnsupportedStore, match="only if it is absent"):
        Store(URL).require_writable()


def test_pushing_and_pulling_again_move_nothing(hub: HubStandIn, tiny_dataset: Path, tmp_path: Path) -> None:
    first = push(tiny_dataset, URL, progress=False)
    hub.requests.clear()
    again = push(tiny_dataset, URL, progress=False)
    assert (again.files, again.bytes, again.already_there) == (0, 0, first.files)
    assert hub.asked("PUT", "/lfs/") == []
    pull(URL, tmp_path / "copy", progress=False)
    hub.requests.clear()
    assert pull(URL, tmp_path / "copy", progress=False).files == 0
    read = [path for path in hub.asked("GET", "/datasets/") if path.endswith(".parquet")]
    assert [path for path in read if not path.endswith(PREVIEW_NAME)] == []


def test_a_push_that_was_killed_sends_only_what_is_missing(hub: HubStandIn, tiny_dataset: Path, tmp_path: Path) -> None:
    held = Fault("PUT", f"/lfs/{open_dataset(tiny_dataset).shards[1].file.sha256}")
    hub.faults.append(held)
    child = subprocess.Popen(
        [sys.executable, "-c", PUSH, str(tiny_dataset), URL],
        cwd=REPOSITORY,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"},
    )
    assert held.arrived.wait(60)
    child.kill()
    assert child.wait() == -9
    held.released.set()

    there = set(hub.repositories[NAME].branches["main"])
    assert open_dataset(tiny_dataset).shards[0].file.name in there
    assert MANIFEST_NAME not in there
    with pytest.raises(DatasetNotSealed):
        pull(URL, tmp_path / "copy", progress=False)
    hub.requests.clear()
    resumed = push(tiny_dataset, URL, progress=False)
    assert (resumed.files, resumed.already_there) == (2, len(there) - 1)
    assert len(hub.asked("PUT", "/lfs/")) == 3  # with the preview of the card that it gets
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    assert pull(URL, tmp_path / "copy", progress=False).dataset_id == resumed.dataset_id


def test_a_revision_holds_a_dataset_of_its_own(
    hub: HubStandIn, tiny_dataset: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = another_dataset(tmp_path / "other", tokenizer_folder)
    push(tiny_dataset, URL, progress=False)
    with pytest.raises(AnotherDataset, match="another revision"):
        push(other, URL, progress=False)
    for _ in range(2):
        push(other, f"{URL}@v2", private=False, progress=False)
    assert open_dataset(f"{URL}@v2").dataset_id == open_dataset(other).dataset_id
    assert open_dataset(URL).dataset_id == open_dataset(tiny_dataset).dataset_id


def test_a_public_push_is_public_and_shows_its_way(
    hub: HubStandIn,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push(tiny_dataset, URL, private=False)
    assert "push: 100%" in capsys.readouterr().err
    log_in(monkeypatch, "")
    pull(URL, tmp_path / "copy")
    assert "copy: 100%" in capsys.readouterr().err
    assert not hub.repositories[NAME].private
    assert len(open_dataset(URL)) == len(open_dataset(tiny_dataset))


def test_a_push_without_a_login_has_a_named_error(
    hub: HubStandIn, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CredentialsMissing, match="hf auth login"):
        push(tiny_dataset, URL, progress=False)
    log_in(monkeypatch, "stale")
    with pytest.raises(CredentialsMissing, match="hf auth login"):
        push(tiny_dataset, URL, progress=False)
    log_in(monkeypatch, "reader")
    with pytest.raises(AccessDenied, match="HF_TOKEN"):
        push(tiny_dataset, URL, progress=False)
    monkeypatch.delenv("HF_TOKEN")
    (tiny_dataset / open_dataset(tiny_dataset).shards[0].file.name).unlink()  # found by reading all files, thus later
    with pytest.raises(CredentialsMissing, match="hf auth login"):
        push(tiny_dataset, URL, progress=False)
    assert hub.repositories == {}


def test_a_refusal_in_the_middle_of_a_push_has_a_name(hub: HubStandIn, tiny_dataset: Path) -> None:
    hub.faults.append(Fault("PUT", "/lfs/", status=403))
    with pytest.raises(AccessDenied, match="writing to the Hub"):
        push(tiny_dataset, URL, progress=False)
    hub.faults.append(Fault("POST", f"/api/datasets/{NAME}/commit", status=413))
    with pytest.raises(StorageFailed, match="writing to the Hub"):
        push(tiny_dataset, URL, progress=False)


def test_a_quota_of_the_repository_has_a_name(hub: HubStandIn, tiny_dataset: Path) -> None:
    hub.quota = 100
    with pytest.raises(StorageFailed, match="quota"):
        push(tiny_dataset, URL, progress=False)


def test_a_card_that_was_mended_is_pushed_under_the_same_id(hub: HubStandIn, tiny_dataset: Path) -> None:
    first = push(tiny_dataset, URL, progress=False)
    (tiny_dataset / CARD_NAME).write_text("# Better\n")
    again = push(tiny_dataset, URL, progress=False)
    assert (again.dataset_id, again.files) == (first.dataset_id, 0)
    assert hub.repositories[NAME].branches["main"][CARD_NAME] == b"# Better\n"
    hub.requests.clear()
    push(tiny_dataset, URL, progress=False)
    assert hub.asked("POST", f"/api/datasets/{NAME}/commit/") == []


def test_files_that_the_repository_ignores_have_a_name(hub: HubStandIn, tiny_dataset: Path) -> None:
    hub.ignored = ".parquet"
    with pytest.raises(StorageFailed, match=r"\.gitignore"):
        push(tiny_dataset, URL, progress=False)
    assert MANIFEST_NAME not in hub.repositories[NAME].branches["main"]


def test_a_card_that_the_hub_refuses_has_a_name(hub: HubStandIn, tiny_dataset: Path) -> None:
    (tiny_dataset / CARD_NAME).write_text("---\nnot: [valid\n---\n")
    with pytest.raises(CardRefused, match="bad yaml"):
        push(tiny_dataset, URL, progress=False)
    (tiny_dataset / CARD_NAME).write_bytes(bytes(17 << 20))
    with pytest.raises(FileDamaged, match="at most"):
        push(tiny_dataset, URL, progress=False)


def test_a_repository_or_revision_that_is_not_there_has_a_name(
    hub: HubStandIn, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (URL, f"{URL}@v9"):
        with pytest.raises(StoreNotFound, match="check the name"):
            pull(url, tmp_path / "copy", progress=False)
    push(tiny_dataset, URL, progress=False)
    log_in(monkeypatch, "")
    with pytest.raises(StoreNotFound, match="hf auth login"):
        pull(URL, tmp_path / "copy", progress=False)
    assert not (tmp_path / "copy").exists()


def test_a_repository_without_a_dataset_has_a_name(hub: HubStandIn, tiny_dataset: Path, tmp_path: Path) -> None:
    push(tiny_dataset, URL, progress=False)
    hub.repositories[NAME].branches["main"] = {"README.md": b""}
    with pytest.raises(DatasetNotFound):
        pull(URL, tmp_path / "copy", progress=False)


@pytest.mark.parametrize("url", ["hf://some-org/some-model", "hf://datasets/one", f"{URL}/folder", "hf://"])
def test_an_address_that_is_no_dataset_repository_has_a_name(tiny_dataset: Path, url: str) -> None:
    with pytest.raises(UnsupportedStore, match="hf://datasets/ORG/NAME"):
        push(tiny_dataset, url, progress=False)


def test_a_revision_may_hold_a_slash() -> None:
    assert parse_hub_url("hf://datasets/a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    assert parse_hub_url("hf://datasets/a/b/").url == "hf://datasets/a/b"


def test_a_remote_dataset_is_not_pushed_to_the_hub(hub: HubStandIn, tiny_dataset: Path, tmp_path: Path) -> None:
    push(tiny_dataset, f"memory://{tmp_path.name}", progress=False)
    with pytest.raises(UnsupportedStore, match="coldstill pull"):
        push(f"memory://{tmp_path.name}", URL, progress=False)


@pytest.mark.parametrize("destination", ["memory", "local", "memory to memory"])
def test_a_push_to_another_store_gives_an_equal_dataset(destination: str, tiny_dataset: Path, tmp_path: Path) -> None:
    source = str(tiny_dataset)
    url = str(tmp_path / "there") if destination == "local" else f"memory://{tmp_path.name}-there"
    if destination == "memory to memory":
        source = f"memory://{tmp_path.name}-source"
        push(tiny_dataset, source, progress=False)
    pushed = push(source, url, progress=False)
    assert verify(url, deep=True, progress=False) == []
    assert open_dataset(url).dataset_id == pushed.dataset_id == open_dataset(tiny_dataset).dataset_id
    assert push(source, url, progress=False).files == 0
    assert Store(url).names(RUN_FOLDER) == []


def test_what_is_not_sealed_or_not_whole_is_not_pushed(tiny_dataset: Path, tmp_path: Path) -> None:
    shard = tiny_dataset / open_dataset(tiny_dataset).shards[2].file.name
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FileDamaged, match="coldstill verify"):
        push(tiny_dataset, str(tmp_path / "there"), progress=False)
    (tiny_dataset / MANIFEST_NAME).unlink()
    with pytest.raises(DatasetNotSealed):
        push(tiny_dataset, str(tmp_path / "there"), progress=False)
    with pytest.raises(DatasetNotFound):
        push(tmp_path, str(tmp_path / "there"), progress=False)
    assert not (tmp_path / "there").exists()


def test_another_dataset_is_not_overwritten(tiny_dataset: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    other = another_dataset(tmp_path / "other", tokenizer_folder)
    begun = tmp_path / "begun"
    (begun / "commits").mkdir(parents=True)
    (begun / "commits" / "000000.json").write_text("{}")
    half = tmp_path / "half"
    half.mkdir()
    (half / "dataset.json").write_text("{}")
    for folder, what in ((other, "a sealed dataset"), (begun, "not finished"), (half, r"another dataset\.json")):
        before = files_in(folder)
        with pytest.raises(AnotherDataset, match=what):
            pull(tiny_dataset, folder, progress=False)
        assert files_in(folder) == before


def test_a_pull_that_was_interrupted_resumes_and_is_no_dataset_before(tiny_dataset: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(tiny_dataset, tmp_path / "damaged"))
    shard = damaged / open_dataset(damaged).shards[1].file.name
    right = shard.read_bytes()
    for wrong, error in ((right[:-1] + b"x", ShardDamaged), (right + b"x", ShardDamaged), (None, ShardMissing)):
        shard.unlink()
        if wrong is not None:
            shard.write_bytes(wrong)
        with pytest.raises(error, match=shard.name):
            pull(damaged, tmp_path / "copy", progress=False)
        assert not (tmp_path / "copy" / "shards" / shard.name).exists()
        with pytest.raises((DatasetNotFound, DatasetNotSealed)):
            open_dataset(tmp_path / "copy")
    shard.write_bytes(right)
    done = pull(damaged, tmp_path / "copy", progress=False)
    assert done.files >= 1
    assert files_in(tmp_path / "copy") == names(open_dataset(tiny_dataset))


def test_a_file_of_the_header_that_is_damaged_has_a_name(tiny_dataset: Path, tmp_path: Path) -> None:
    plan = tiny_dataset / PLAN_NAME
    plan.write_bytes(plan.read_bytes() + b" ")
    with pytest.raises(FileDamaged, match="plan"):
        pull(tiny_dataset, tmp_path / "copy", progress=False)
    plan.unlink()
    with pytest.raises(FileMissing, match="plan"):
        pull(tiny_dataset, tmp_path / "copy", progress=False)


def test_a_pull_mends_a_copy(tiny_dataset: Path, tmp_path: Path) -> None:
    pull(tiny_dataset, tmp_path / "copy", progress=False)
    shards = sorted((tmp_path / "copy" / "shards").iterdir())
    shards[0].write_bytes(bytes(shards[0].stat().st_size))
    shards[1].unlink()
    assert pull(tiny_dataset, tmp_path / "copy", progress=False).files == 2
    assert verify(tmp_path / "copy", progress=False) == []


def test_a_place_that_is_no_folder_has_a_name(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(UnsupportedStore, match="a file"):
        pull(tiny_dataset, tmp_path / "a file", progress=False)
    with pytest.raises(UnsupportedStore, match="coldstill push"):
        pull(tiny_dataset, "s3://bucket/dataset", progress=False)


def test_a_disk_without_room_has_a_name(small_disk: SmallDisk, tiny_dataset: Path) -> None:
    small_disk.resize("16k")
    with pytest.raises(StorageFull, match="bytes free"):
        pull(tiny_dataset, small_disk.path / "copy", progress=False)
    assert list(small_disk.path.iterdir()) == []
    small_disk.resize("10m")
    pull(tiny_dataset, small_disk.path / "copy", progress=False)
    assert verify(small_disk.path / "copy", progress=False) == []


def test_a_manifest_that_is_replaced_meanwhile_has_a_name(tiny_dataset: Path, tmp_path: Path) -> None:
    from coldstill.tools.pull import copy_dataset

    dataset = open_dataset(tiny_dataset)
    (tiny_dataset / MANIFEST_NAME).write_text("{}")
    with pytest.raises(CommitDamaged, match="replaced meanwhile"):
        copy_dataset(dataset, Store(tmp_path / "copy"), progress=False)
    assert not (tmp_path / "copy" / MANIFEST_NAME).exists()


@pytest.mark.parametrize("name", [CARD_NAME, "shard"])
def test_a_link_in_a_strangers_dataset_takes_no_file_along(tiny_dataset: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a private key")
    link = tiny_dataset / (open_dataset(tiny_dataset).shards[0].file.name if name == "shard" else name)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with pytest.raises(OutsideDataset if name == CARD_NAME else (OutsideDataset, FileDamaged)):
        push(tiny_dataset, str(tmp_path / "there"), progress=False)
    with pytest.raises(OutsideDataset, match="a link to"):
        pull(tiny_dataset, tmp_path / "there", progress=False)
    assert all(path.read_text(errors="replace") != "a private key" for path in (tmp_path / "there").rglob("*.*"))
