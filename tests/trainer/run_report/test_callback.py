"""The report of a run: at each kind of end, over resumes, and without a disk that takes it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from coldstill import load_logit_dataset
from coldstill.common.files import PAGE_NAME
from coldstill.common.interrupts import Interrupted
from coldstill.storage_schema.errors import StorageFull
from coldstill.trainer import train as train_module
from coldstill.trainer.errors import LoaderWorkerDied
from coldstill.trainer.run_report import callback as callback_module
from coldstill.trainer.run_report import pace
from coldstill.trainer.run_report.callback import RunReport
from coldstill.trainer.run_report.facts import RunFacts
from coldstill.trainer.run_report.record import RECORD_NAME, RunRecord, read_run
from coldstill.trainer.train import train
from tests.trainer.test_train import make_config
from tests.trainer.training import KillAt, Killed, build

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
        ("callback.new_file", OSError(28, "No space left on device")),
        ("callback.run_page", ValueError("a number without a drawing")),
        ("facts.flat", RecursionError("settings of settings")),
    ],
    ids=str,
)
def test_a_report_that_fails_in_any_way_does_not_end_the_training(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, error: Exception
):
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"coldstill.trainer.run_report.{part}", broken)
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", training={"max_steps": 1})
    assert train(config).steps == 1
    assert (tmp_path / "run" / PAGE_NAME).exists() == (part == "facts.flat")


def test_a_run_without_clipping_has_a_page(tiny_dataset: Path, tiny_student: Path, tmp_path: Path):
    training = {"max_steps": 1, "max_grad_norm": float("inf")}
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", training=training)
    assert train(config).steps == 1
    assert "<dt>training.max_grad_norm</dt><dd>inf</dd>" in (tmp_path / "run" / PAGE_NAME).read_text()


def test_a_bar_of_the_caller_stays(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    texts: list[str] = []

    class Ours(pace.EndTimeBar):
        def on_train_end(self, args, state, control, **kwargs) -> None:
            texts.append(self.training_bar.postfix)
            super().on_train_end(args, state, control, **kwargs)

    class Own(ProgressCallback):
        ended = False

        def on_train_end(self, args, state, control, **kwargs) -> None:
            self.ended = True
            super().on_train_end(args, state, control, **kwargs)

    own = Own()
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", training={"max_steps": 3})
    monkeypatch.setattr(pace, "EndTimeBar", Ours)
    train(config, callbacks=[own])
    assert own.ended
    assert len(texts) == 1
    assert texts[0].startswith("ends about")


def test_a_loader_that_dies_during_a_write_still_ends_the_training(tmp_path: Path):
    def dies() -> float:
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")

    report = RunReport(tmp_path / "run", RunFacts, write=True, clock=dies)
    with pytest.raises(LoaderWorkerDied):
        report.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=1, log_history=[]), None)


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


def test_a_running_record_says_how_long_silences_were_before(tmp_path: Path):
    clock = {"s": 0.0}
    report = RunReport(tmp_path, RunFacts, write=True, clock=lambda: clock["s"])
    state = SimpleNamespace(global_step=0, max_steps=9, log_history=[])
    report.on_train_begin(None, state, None)
    assert read_run(tmp_path).longest_gap_s is None
    for clock["s"] in (40.0, 55.0):
        report.on_log(None, state, None)
    assert (read_run(tmp_path).state, read_run(tmp_path).longest_gap_s) == ("running", 40.0)


def test_a_trainer_of_python_writes_the_page_and_one_argument_turns_it_off(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path
):
    settings = {"max_steps": 4, "learning_rate": 0.005, "hub_token": "hf_secret", "pack_length": 64, "loss": "js"}
    trainer, _ = build(
        tiny_dataset, tiny_student, tmp_path / "run", **settings, eval_dataset=load_logit_dataset(tiny_dataset)
    )
    trainer.evaluate()  # before a training there is nothing to write
    assert not (tmp_path / "run" / RECORD_NAME).exists()
    trainer.train()
    trainer.evaluate()
    record = read_run(tmp_path / "run")
    assert (record.state, record.step, record.max_steps) == ("finished", 4, 4)
    assert [step for step, _ in record.points("loss")] == [1, 2, 3, 4]
    assert record.settings["loss.name"] == "js"
    assert {"learning_rate", "pack_length", "loss.name", "max_steps"} <= set(record.changed)
    assert "warmup_steps" in record.settings
    assert not {"warmup_steps", "output_dir"} & set(record.changed)
    assert "hf_secret" not in (tmp_path / "run" / RECORD_NAME).read_text()
    assert record.facts["Student"]["parameters"]
    assert (record.settings["loss.tail"], record.facts["Student"]["tail"]) == ("auto", "bucket")
    assert record.summary["targets"] > 0
    assert "finished" in (tmp_path / "run" / PAGE_NAME).read_text()
    quiet, _ = build(tiny_dataset, tiny_student, tmp_path / "quiet", max_steps=1, report=False)
    quiet.train()
    assert not list((tmp_path / "quiet").glob("report.*"))


def test_a_trainer_of_python_shows_how_it_ended_and_resumed(tiny_dataset: Path, tiny_student: Path, tmp_path: Path):
    shape = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, callbacks=[KillAt(3)], **shape)
    with pytest.raises(Killed):
        trainer.train()
    assert (read_run(tmp_path).state, read_run(tmp_path).step) == ("failed", 3)
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, **shape)
    trainer.train(resume_from_checkpoint=True)
    assert (read_run(tmp_path).state, read_run(tmp_path).resumed) == ("finished", (2,))


def test_a_trainer_of_python_trains_where_no_page_can_be_written(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("of the page")

    monkeypatch.setattr(callback_module, "run_page", fails)
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_trainer_of_python_writes_lines_into_a_log(tiny_dataset: Path, tiny_student: Path, tmp_path: Path, capfd):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, max_steps=3, disable_tqdm=False)
    capfd.readouterr()
    trainer.train()
    error = capfd.readouterr().err
    assert "\r" not in error
    assert "3/3" in error
