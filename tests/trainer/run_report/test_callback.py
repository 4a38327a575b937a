"""The report of a run: at each kind of end, over resumes, and without a disk that takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from coldstill.common.interrupts import Interrupted
from coldstill.storage_schema.errors import StorageFull
from coldstill.trainer import train as train_module
from coldstill.trainer.errors import LoaderWorkerDied
from coldstill.trainer.run_report import callback as callback_module
from coldstill.trainer.run_report.callback import RunReport
from coldstill.trainer.run_report.record import PAGE_NAME, RECORD_NAME, RunRecord, read_run
from coldstill.trainer.train import train
from tests.trainer.test_train import make_config
from tests.trainer.training import KillAt, Killed

SHORT = {"training": {"max_steps": 6, "save_steps": 3}}


class InterruptAt(TrainerCallback):
    """Ends the run as a signal does."""

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == 5:
            raise Interrupted(15, "a checkpoint is kept")


class Told(TrainerCallback):
    """What a reporting integration of transformers receives."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def on_log(self, args, state, control, logs=None, **_) -> None:
        self.lines.append(dict(logs))


def test_a_run_that_was_ended_twice_shows_its_whole_history(tiny_dataset: Path, tiny_student: Path, tmp_path: Path):
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", **SHORT)
    told = Told()
    with pytest.raises(Killed):
        train(config, callbacks=[KillAt(4), told])
    record = read_run(tmp_path / "run")
    assert (record.state, record.step, record.resumed) == ("failed", 4, ())
    assert "Killed" in (tmp_path / "run" / PAGE_NAME).read_text()
    assert {"loss", "bucket_kl", "taid_t", "targets_per_s", "peak_memory_mb"} <= told.lines[0].keys()
    assert told.lines[0]["targets_per_s"] > 0
    with pytest.raises(Interrupted):
        train(config, callbacks=[InterruptAt()])
    assert (read_run(tmp_path / "run").state, read_run(tmp_path / "run").resumed) == ("interrupted", (3,))
    summary = train(config)
    record = read_run(tmp_path / "run")
    assert (record.state, record.step, record.max_steps, record.resumed) == ("finished", 6, 6, (3,))
    assert [step for step, _ in record.points("loss")] == [1, 2, 3, 4, 5, 6]
    assert record.summary == json.loads(summary.model_dump_json())
    page = (tmp_path / "run" / PAGE_NAME).read_text()
    assert record.facts["Dataset"]["dataset id"] in page
    assert "refresh" not in page
    assert list((tmp_path / "run").glob(".report*")) == []


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("new_file", OSError(28, "No space left on device")),
        ("run_page", ValueError("a number without a drawing")),
        ("flat", RecursionError("settings of settings")),
    ],
    ids=str,
)
def test_a_report_that_fails_in_any_way_does_not_end_the_training(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, error: Exception
):
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(callback_module, part, broken)
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", training={"max_steps": 1})
    assert train(config).steps == 1
    assert (tmp_path / "run" / PAGE_NAME).exists() == (part == "flat")


def test_a_run_without_clipping_has_a_page(tiny_dataset: Path, tiny_student: Path, tmp_path: Path):
    training = {"max_steps": 1, "max_grad_norm": float("inf")}
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", training=training)
    assert train(config).steps == 1
    assert "<dt>training.max_grad_norm</dt><dd>inf</dd>" in (tmp_path / "run" / PAGE_NAME).read_text()


def test_a_bar_of_the_caller_stays(tiny_dataset: Path, tiny_student: Path, tmp_path: Path, capfd):
    class Own(ProgressCallback):
        ended = False

        def on_train_end(self, args, state, control, **kwargs) -> None:
            self.ended = True
            super().on_train_end(args, state, control, **kwargs)

    own = Own()
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", training={"max_steps": 3})
    train(config, callbacks=[own])
    assert own.ended
    assert "ends about" in capfd.readouterr().err


def test_a_loader_that_dies_during_a_write_still_ends_the_training(tmp_path: Path):
    def dies() -> float:
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")

    report = RunReport(make_config(tmp_path, tmp_path, tmp_path / "run"), None, write=True, clock=dies)
    with pytest.raises(LoaderWorkerDied):
        report.on_log(None, None, None)


def test_a_run_whose_student_is_not_written_is_shown_as_failed(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_module, "write_student", full)
    with pytest.raises(StorageFull):
        train(make_config(tiny_dataset, tiny_student, tmp_path / "run", training={"max_steps": 1}))
    assert read_run(tmp_path / "run").state == "failed"
    assert "StorageFull" in (read_run(tmp_path / "run").error or "")


@pytest.mark.slow
def test_a_run_of_an_earlier_release_is_read_from_its_checkpoint(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path
):
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", **SHORT)
    train(config)
    now = read_run(tmp_path / "run")
    (tmp_path / "run" / RECORD_NAME).unlink()
    then = read_run(tmp_path / "run")
    assert (then.state, then.step, then.log, then.summary) == (now.state, now.step, now.log, now.summary)
    for name in ("trainer_state.json", "train_summary.json"):
        (tmp_path / "run" / name).unlink()
    assert isinstance(found := read_run(tmp_path / "run"), RunRecord)
    assert (found.state, found.step) == ("interrupted", 6)
