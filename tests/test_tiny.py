"""`examples/tiny` is a whole, small, licensed dataset that trains a student from a clone and from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from coldstill import open_dataset
from coldstill.common.config_file import load_config
from coldstill.tools.verify import verify
from coldstill.trainer.config import TrainConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = EXAMPLES / "tiny"


def test_it_is_whole_small_and_has_the_license_of_its_text() -> None:
    dataset = open_dataset(TINY)
    assert dataset.header.about.license == "PSF-2.0"
    assert "PSF License Agreement" in (TINY / "LICENSE").read_text()
    assert "PSF-2.0" in (TINY / "README.md").read_text()
    assert verify(TINY, deep=True, progress=False) == []
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 3_000_000


def test_every_file_of_it_is_in_the_repository() -> None:
    done = subprocess.run(["git", "ls-files", "tiny"], cwd=EXAMPLES, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("this is no clone")
    here = {path.relative_to(EXAMPLES).as_posix() for path in TINY.rglob("*") if path.is_file()}
    assert here == set(done.stdout.split())


def test_its_teacher_knows_more_than_chance_and_its_rows_hold_text() -> None:
    row = open_dataset(TINY).row(0)
    assert len(row.targets.ids) == len(row.positions) > 0
    assert np.exp(row.targets.logprobs[:, 0]).mean() > 0.1, "a guess among 2,048 ids has a probability of 0.0005"


def test_the_student_has_the_vocabulary_of_the_dataset() -> None:
    settings = load_config(str(EXAMPLES / "tiny_train.yaml"), model=TrainConfig)
    assert settings.dataset == "examples/tiny"
    assert settings.student.from_scratch == "examples/tiny_student"
    config = json.loads((EXAMPLES / "tiny_student" / "config.json").read_text())
    assert config["vocab_size"] == open_dataset(TINY).header.vocab_size


@pytest.mark.slow
def test_it_trains_from_a_folder_that_is_no_clone(tmp_path: Path) -> None:
    """The wheel holds only `coldstill`: the examples are data, and the working folder may be anywhere."""
    for name in ("tiny", "tiny_student"):
        shutil.copytree(EXAMPLES / name, tmp_path / "examples" / name)
    shutil.copy(EXAMPLES / "tiny_train.yaml", tmp_path / "train.yaml")
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "coldstill", "train", "train.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / yaml.safe_load((tmp_path / "train.yaml").read_text())["output"]
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    kls = [line["bucket_kl"] for line in log if "bucket_kl" in line]
    assert kls[-1] < kls[0] / 2, "the student comes closer to its teacher"
