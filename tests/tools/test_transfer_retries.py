"""Laws of pushes and pulls whose requests fail temporarily: they continue, after bounded waits that are shown."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest

pytest.importorskip("huggingface_hub")

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import (
    StorageFailed,
)
from coldstill.storage_schema.store import local
from coldstill.tools.pull import pull
from coldstill.tools.push import push
from coldstill.tools.verify import verify
from tests.tools.hub_stand_in import Fault, HubStandIn
from tests.tools.transfers import NAME, URL, names

pytestmark = pytest.mark.usefixtures("quick_plot")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which take no time here."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


REQUESTS = ("/api/datasets/", "/api/repos/", "/datasets/", "/lfs/")
"""What a push and a pull ask for. The client asks for other things once in a process."""


def request_kinds(hub: HubStandIn) -> list[tuple[str, str]]:
    """The requests so far, each kind once: uploads of different files are of one kind."""
    kinds = [(method, re.sub("[0-9a-f]{64}|shards/.*|(tokenizer/|plan).*", "", path)) for method, path in hub.requests]
    return [kind for kind in dict.fromkeys(kinds) if kind[1].startswith(REQUESTS)]


FAULTS: dict[str, dict[str, Any]] = {
    "429 and Retry-After": {"status": 429, "headers": {"Retry-After": "7"}},
    "503": {"status": 503},
    "a connection that is cut": {"cut": True},
    "an answer that is lost after success": {"late": True},
    "503 more often than the client itself tries again": {"status": 503, "times": 7},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_push_and_a_pull_go_on_by_themselves_whatever_request_fails_temporarily(
    hub: HubStandIn, tiny_dataset: Path, tmp_path: Path, waits: list[float], kind: str
) -> None:
    def clear() -> None:
        hub.repositories.clear()
        hub.large.clear()
        hub.requests.clear()
        fsspec.get_filesystem_class("hf").clear_instance_cache()

    pushed = push(tiny_dataset, URL, progress=False)
    of_push = request_kinds(hub)
    hub.requests.clear()
    pull(URL, tmp_path / "first", progress=False)
    of_pull = request_kinds(hub)
    assert {method for method, _ in of_push} == {"GET", "POST", "PUT"}
    for method, start in of_push:
        clear()
        hub.faults[:] = [Fault(method, start, **FAULTS[kind])]
        assert push(tiny_dataset, URL, progress=False).dataset_id == pushed.dataset_id, (method, start)
        assert hub.faults[0].arrived.is_set()
        assert names(open_dataset(tiny_dataset)) <= set(hub.repositories[NAME].branches["main"])
    for number, (method, start) in enumerate(of_pull):
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        hub.faults[:] = [Fault(method, start, **FAULTS[kind])]
        pull(URL, tmp_path / f"copy {number}", progress=False)
        assert hub.faults[0].arrived.is_set(), (method, start)
        assert verify(tmp_path / f"copy {number}", progress=False) == []
    if "Retry-After" in kind:
        assert max(waits) >= 7
    assert waits


def test_a_store_that_stays_busy_ends_the_command_after_bounded_waits(
    hub: HubStandIn, tiny_dataset: Path, waits: list[float]
) -> None:
    hub.faults.append(Fault("POST", "/api/repos/create", status=503, times=1000))
    with pytest.raises(StorageFailed, match="503"):
        push(tiny_dataset, URL, progress=False)
    assert sum(waits) < 900
    hub.faults[:] = [Fault("POST", "/api/repos/create", status=429, headers={"Retry-After": "86400"}, times=1000)]
    waits.clear()
    with pytest.raises(StorageFailed, match="429"):
        push(tiny_dataset, URL, progress=False)
    assert waits == []


def test_a_wait_is_shown_above_the_progress_bar(
    hub: HubStandIn, tiny_dataset: Path, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.append(Fault("POST", f"/api/datasets/{NAME}/preupload", status=503, times=7))
    push(tiny_dataset, URL)
    assert "waiting" in capsys.readouterr().err


def test_two_pulls_into_one_folder_both_succeed(
    tiny_dataset: Path, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that ends removes the temporary files of the other."""
    place, remove = local.replace, shutil.rmtree
    folder, results, lost = tmp_path / "copy", [], []

    def place_after_another_pull(part: Path, final: Path) -> None:
        if final.name.endswith(".parquet") and not lost:
            lost.append(part)
            results.append(pull(tiny_dataset, folder, progress=False))
            assert not part.exists()
        place(part, final)

    def remove_while_another_writes(path: str, *values: Any, **options: Any) -> None:
        if len(lost) == 1:
            lost.append(Path(path))
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        remove(path, *values, **options)

    monkeypatch.setattr(local, "replace", place_after_another_pull)
    monkeypatch.setattr(shutil, "rmtree", remove_while_another_writes)
    results.append(pull(tiny_dataset, folder, progress=False))
    assert len(lost) == 2
    assert len({result.dataset_id for result in results}) == 1
    assert verify(folder, deep=True, progress=False) == []
    assert not (folder / "_run").exists()
