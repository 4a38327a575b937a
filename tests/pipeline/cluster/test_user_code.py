"""Laws of the user's own code on workers: `module:name` of the folder where the capture was started, by real Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coldstill.pipeline.cluster.actor import search_last
from coldstill.storage_schema.commits import read_commit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.tools.verify import verify
from tests.pipeline.capturing import capture_config, write_config

MODULE = """
from coldstill.pipeline.teachers.transformers_teacher import TransformersTeacher


class MyTeacher(TransformersTeacher):
    tail = "exact"
    draw_method = "systematic"

    @property
    def environment(self):
        return {**super().environment, "engine": "mine"}


def adapt(row):
    return {**row, "id": f"mine-{row['id']}"}
"""
HOSTILE = (
    "pipeline",
    "trainer",
    "storage_schema",
    "demo",
    "tools",
    "cli",
    "common",
    "datasets",
    "tokenizers",
    "accelerate",
)


def test_the_drivers_folder_is_searched_after_all_other_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/mine", "/python", "/packages"])
    search_last("/mine")
    assert sys.path == ["/python", "/packages", "/mine"]
    search_last("/mine")
    assert sys.path == ["/python", "/packages", "/mine"]
    search_last("/packages")
    assert sys.path == ["/python", "/packages", "/mine"], "an entry that Ray did not put first stays in its place"


def test_workers_import_a_module_of_the_folder_of_the_capture_and_no_hostile_one(tmp_path: Path) -> None:
    """By the console script, whose own folder is first on `sys.path`, not the current one."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_module.py").write_text(MODULE)
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"raise SystemExit('a file of the user hid a package: {name}')\n")
    config = capture_config(tmp_path)
    mine = {
        "teacher": config.teacher.model_copy(update={"engine": "my_module:MyTeacher"}),
        "source": config.source.model_copy(update={"adapter": "my_module:adapt"}),
    }
    path = write_config(tmp_path / "capture.yaml", config.model_copy(update=mine))
    script = Path(sys.executable).with_name("coldstill")
    done = subprocess.run([script, "capture", path], cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert verify(config.output, deep=True, progress=False) == []
    dataset = open_dataset(config.output)
    assert [row.sample_id for row in dataset.rows()] == [f"mine-chat-{i}" for i in range(40)]
    assert read_commit(dataset.store, 0).environment["engine"] == "mine"
