"""Laws of the card in a push and a pull: what somebody wrote is kept, and the shards are found without it."""

from __future__ import annotations

import functools
from pathlib import Path

import fsspec
import pytest
import yaml

pytest.importorskip("huggingface_hub")

from coldstill.common.packages import PackagesMissing
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.store import Store
from coldstill.tools.card import pushed
from coldstill.tools.card.card import front_matter, make_card
from coldstill.tools.card_text import CARD_FILES, CARD_NAME, PREVIEW_NAME, is_unedited, marked_card, with_shards
from coldstill.tools.errors import AnotherDataset, CardExists
from coldstill.tools.pull import pull
from coldstill.tools.push import push
from coldstill.tools.verify import verify
from tests.tools.hub_stand_in import HubStandIn, Repository
from tests.tools.transfers import NAME, URL, another_dataset, files_in, names

pytestmark = pytest.mark.usefixtures("quick_plot")


def test_a_repository_that_holds_something_else_is_refused_or_replaced_on_request(
    hub: HubStandIn, tiny_dataset: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    theirs = {".gitattributes": b"", "README.md": b"# Mine\n", "train.csv": b"a,b\n", "shards/x.parquet": b"PAR1"}
    hub.repositories[NAME] = Repository(private=True, branches={"main": dict(theirs)})
    with pytest.raises(AnotherDataset, match=r"train\.csv(.|\n)*--replace"):
        push(tiny_dataset, URL, progress=False)
    assert hub.repositories[NAME].branches["main"] == theirs
    push(tiny_dataset, URL, progress=False, replace=True)
    held = hub.repositories[NAME].branches["main"]
    assert set(held) == names(open_dataset(tiny_dataset)) | {".gitattributes", *CARD_FILES}
    assert open_dataset(URL).dataset_id == open_dataset(tiny_dataset).dataset_id
    assert is_unedited(held[CARD_NAME])
    other = another_dataset(tmp_path / "other", tokenizer_folder)
    push(other, URL, progress=False, replace=True)
    assert open_dataset(other).dataset_id.encode() in hub.repositories[NAME].branches["main"][CARD_NAME]
    assert set(hub.repositories[NAME].branches["main"]) == names(open_dataset(other)) | {".gitattributes", *CARD_FILES}
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    assert verify(URL, deep=True, progress=False) == []


def test_a_repository_with_a_card_and_a_license_only_is_pushed_into_and_keeps_them(
    hub: HubStandIn, tiny_dataset: Path
) -> None:
    mine = b"---\nlicense: mit\npretty_name: Mine\n---\n# Mine\n\nMy text.\n"
    hub.repositories[NAME] = Repository(private=True, branches={"main": {"README.md": mine, "LICENSE": b"MIT"}})
    push(tiny_dataset, URL, progress=False)
    held = hub.repositories[NAME].branches["main"]
    assert held["LICENSE"] == b"MIT"
    card = held[CARD_NAME].decode()
    assert card.endswith("# Mine\n\nMy text.\n")
    configs = yaml.safe_load(card.split("---")[1])["configs"]
    assert [config["config_name"] for config in configs] == ["preview", "rows"]
    assert configs[1]["data_files"] == "shards/*.parquet"
    assert held[PREVIEW_NAME].startswith(b"PAR1")
    assert "license: mit\npretty_name: Mine\n" in card
    hub.requests.clear()
    push(tiny_dataset, URL, progress=False)
    assert hub.asked("POST", f"/api/datasets/{NAME}/commit/") == []


def test_the_name_of_a_teacher_adds_no_metadata_to_the_card_of_someone_else(tiny_dataset: Path) -> None:
    header = open_dataset(tiny_dataset).header
    name = 'x configs: [{config_name: rows, data_files: "https://elsewhere/x.parquet"}] # \n configs: []'
    teacher = header.teacher.model_copy(update={"name": name})
    front = front_matter(header.model_copy(update={"teacher": teacher}), rows=24, preview=True)
    card = with_shards(b"---\nlicense: mit\n---\n# Mine\n", front).decode()
    fields = yaml.safe_load(card.split("---")[1])
    assert fields["license"] == "mit"
    assert fields["configs"] == yaml.safe_load(front.split("---")[1])["configs"]
    assert "elsewhere" not in card


def test_a_card_that_was_edited_on_the_hub_is_not_overwritten_unasked(hub: HubStandIn, tiny_dataset: Path) -> None:
    push(tiny_dataset, URL, progress=False)
    held = hub.repositories[NAME].branches["main"]
    held[CARD_NAME] += b"\nA line that somebody added on the Hub.\n"
    edited = held[CARD_NAME]
    push(tiny_dataset, URL, progress=False)  # no card of its own
    assert held[CARD_NAME] == edited
    (tiny_dataset / CARD_NAME).write_text("# Another\n")
    with pytest.raises(CardExists, match="--replace"):
        push(tiny_dataset, URL, progress=False)
    assert held[CARD_NAME] == edited
    push(tiny_dataset, URL, progress=False, replace=True)
    assert held[CARD_NAME] == b"# Another\n"


@pytest.mark.parametrize("place", ["folder", "store"])
def test_a_card_that_was_edited_at_the_destination_is_kept(tiny_dataset: Path, tmp_path: Path, place: str) -> None:
    there = str(tmp_path / "there") if place == "folder" else f"memory://{tmp_path.name}-card"
    (tiny_dataset / CARD_NAME).write_bytes(marked_card("# Generated\n"))
    push(tiny_dataset, there, progress=False)
    (tiny_dataset / CARD_NAME).write_bytes(marked_card("# Generated anew\n"))
    push(tiny_dataset, there, progress=False)  # what nobody edited is brought up to date
    assert Store(there).read(CARD_NAME) == marked_card("# Generated anew\n")
    Store(there).put(CARD_NAME, b"# Edited\n")
    with pytest.raises(CardExists, match="--replace"):
        push(tiny_dataset, there, progress=False)
    assert Store(there).read(CARD_NAME) == b"# Edited\n"
    push(tiny_dataset, there, replace=True, progress=False)
    assert Store(there).read(CARD_NAME) == marked_card("# Generated anew\n")


def test_a_pull_keeps_a_card_that_was_edited_here_and_says_so(
    tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tiny_dataset / CARD_NAME).write_bytes(marked_card("# Generated\n"))
    pull(tiny_dataset, tmp_path / "copy", progress=False)
    (tmp_path / "copy" / CARD_NAME).write_text("# Edited here\n")
    pull(tiny_dataset, tmp_path / "copy", progress=False)
    assert (tmp_path / "copy" / CARD_NAME).read_text() == "# Edited here\n"
    assert "is kept" in caplog.text


def test_a_folder_that_holds_something_else_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("# My project\n")
    (project / "setup.py").write_text("")
    for copy in (pull, push):
        with pytest.raises(AnotherDataset, match=r"setup\.py"):
            copy(tiny_dataset, str(project), progress=False)
    assert files_in(project) == {"README.md", "setup.py"}
    (project / "setup.py").unlink()
    pull(tiny_dataset, project, progress=False)
    assert (project / "README.md").read_text() == "# My project\n"


@pytest.mark.parametrize("complete", [True, False])
def test_datasets_loads_what_was_pushed_without_a_card(
    hub: HubStandIn,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    complete: bool,
) -> None:
    """With a generated card, whose first configuration is the preview; without matplotlib, with a short one."""
    datasets = pytest.importorskip("datasets")
    if not complete:
        monkeypatch.setattr(pushed, "make_card", raise_packages_missing)
    push(tiny_dataset, URL, progress=False)
    assert ("gets a generated one" if complete else "pip install") in caplog.text
    for name, data in hub.repositories[NAME].branches["main"].items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(data)
    load = functools.partial(datasets.load_dataset, str(tmp_path / "repository"), cache_dir=str(tmp_path / "cache"))
    assert len(load("rows", split="train")) == len(open_dataset(tiny_dataset))
    assert list(load()) == (["preview"] if complete else ["train"])


def raise_packages_missing(*_: object, **__: object) -> None:
    raise PackagesMissing("packages", found="no matplotlib", wanted="share", fix="pip install x")


@pytest.mark.parametrize("place", ["hub", "folder", "store"])
def test_a_push_without_a_card_makes_that_of_the_dataset_and_writes_nothing_into_the_source(
    hub: HubStandIn, tiny_dataset: Path, tmp_path: Path, place: str
) -> None:
    there = {"hub": URL, "folder": str(tmp_path / "there"), "store": f"memory://{tmp_path.name}-made"}[place]
    before = files_in(tiny_dataset)
    push(tiny_dataset, there, progress=False)
    held = {name: Store(there).read(name) for name in CARD_FILES}
    assert held == make_card(open_dataset(tiny_dataset), progress=False)
    assert is_unedited(held[CARD_NAME])
    assert files_in(tiny_dataset) == before


@pytest.mark.parametrize("place", ["hub", "folder", "a card of someone"])
def test_a_card_that_cannot_be_made_does_not_stop_a_push(
    hub: HubStandIn, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, place: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a plot of nothing")

    monkeypatch.setattr(pushed, "make_card", broken)
    monkeypatch.setattr(pushed, "preview_parquet", broken)
    there = str(tmp_path / "there") if place == "folder" else URL
    if place == "a card of someone":
        hub.repositories[NAME] = Repository(private=True, branches={"main": {"README.md": b"# Mine\n"}})
    push(tiny_dataset, there, progress=False)
    assert "a plot of nothing" in caplog.text
    assert open_dataset(there).dataset_id == open_dataset(tiny_dataset).dataset_id
    assert place == "folder" or b"shards/*.parquet" in hub.repositories[NAME].branches["main"][CARD_NAME]


def test_a_push_again_does_not_make_a_card_again(
    hub: HubStandIn, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would decode the whole dataset each time."""
    places = (URL, str(tmp_path / "there"))
    for there in places:
        push(tiny_dataset, there, progress=False)
    monkeypatch.setattr(pushed, "make_card", lambda *_, **__: pytest.fail("made again"))
    for there in places:
        push(tiny_dataset, there, progress=False)
