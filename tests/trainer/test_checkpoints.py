"""The output folder of a run: its identity, which checkpoint counts, and files of earlier releases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coldstill.trainer.checkpoints import ResumePoint, claim, newest_checkpoint, resume_point
from coldstill.trainer.errors import CheckpointMismatch

ORDER = {
    "dataset_ids": ["a" * 64],
    "seed": 0,
    "batch_size": 2,
    "pack_length": None,
    "gradient_accumulation_steps": 3,
    "devices": 1,
}
CURSOR = {"version": 1, "walk": {"epoch": 0, "batches": 6}}
STATE = {
    "global_step": 2,
    "max_steps": 4,
    "best_model_checkpoint": None,
    "stateful_callbacks": {
        "StepRecord": {
            "args": {},
            "attributes": {"order": ORDER, "cursor": CURSOR, "targets": 70, "schedule": {"t": 0.5}},
        },
        "EarlyStopping": {
            "args": {"early_stopping_patience": 3, "early_stopping_threshold": 0.0},
            "attributes": {"early_stopping_patience_counter": 1},
        },
    },
}
"""Parts of a `trainer_state.json` under the names that earlier releases wrote."""


def checkpoint(output: Path, state: dict, *, step: int = 2) -> Path:
    """As an earlier release wrote it: without a list of its files."""
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    return folder


def test_a_state_of_an_earlier_release_leads_to_its_place_in_the_data(tmp_path: Path) -> None:
    assert resume_point(checkpoint(tmp_path, STATE), ORDER) == ResumePoint(2, CURSOR)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.record["targets"] == 70
    assert not found.finished


@pytest.mark.parametrize(("count", "finished"), [(2, False), (3, True)])
def test_a_run_that_stopped_early_is_finished(tmp_path: Path, count: int, finished: bool) -> None:
    stopping = {"args": {"early_stopping_patience": 3}, "attributes": {"early_stopping_patience_counter": count}}
    checkpoint(tmp_path, {**STATE, "stateful_callbacks": {"EarlyStopping": stopping}})
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.finished == finished


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(tmp_path: Path) -> None:
    checkpoint(tmp_path, STATE, step=1)
    checkpoint(tmp_path, {**STATE, "best_model_checkpoint": "/elsewhere/run/checkpoint-1"})
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.best.step) == (2, 1)


def test_a_folder_without_checkpoints_may_change_its_run_and_one_with_them_may_not(tmp_path: Path) -> None:
    claim(tmp_path, {"loss": 1}, write=True)
    claim(tmp_path, {"loss": 2}, write=True)
    assert json.loads((tmp_path / "run.json").read_text()) == {"loss": 2}
    checkpoint(tmp_path, STATE)
    claim(tmp_path, {"loss": 2}, write=True)
    with pytest.raises(CheckpointMismatch, match="differs in loss"):
        claim(tmp_path, {"loss": 3}, write=True)


def test_a_process_that_only_checks_writes_nothing(tmp_path: Path) -> None:
    claim(tmp_path / "run", {"loss": 1}, write=False)
    assert list((tmp_path / "run").iterdir()) == []
