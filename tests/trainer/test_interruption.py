"""Laws of signals during training: a checkpoint within the grace period, and a resumed run like an unbroken one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from coldstill.common.interrupts import Interrupted
from coldstill.trainer.checkpoints import newest_checkpoint
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.distill_trainer import BatchLoader
from coldstill.trainer.interruption import CheckpointOnSignal
from coldstill.trainer.train import train
from tests import making

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture
def not_ignored():
    """Behind `nohup`, processes are started with SIGHUP ignored, and a training leaves it so."""
    found = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum in SIGNALS:
        if found[signum] is signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)
    yield
    for signum, handler in found.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with dropout, whose random numbers must be restored too."""
    folder = making.tiny_llama(tmp_path_factory.mktemp("forgetful"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return folder


def config_of(
    dataset: Path, student: Path, output: Path, *, eval_dataset: str | None = None, **training
) -> TrainConfig:
    shape = {
        "learning_rate": 1e-3,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "save_steps": 100,
    }
    return TrainConfig.model_validate(
        {
            "dataset": str(dataset),
            "output": str(output),
            "eval_dataset": eval_dataset,
            "student": {"model": str(student)},
            "training": {**shape, "dataloader_workers": 0, **training},
        }
    )


def require_equal_weights(output: Path, unbroken: Path) -> None:
    mine, wanted = (AutoModelForCausalLM.from_pretrained(run / "student").state_dict() for run in (output, unbroken))
    for name, weight in wanted.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=0)


class SignalAt(TrainerCallback):
    """Sends signals to this process at one place of one step."""

    def __init__(self, place: str, step: int, *signums: int):
        self._place, self._step, self._signums = place, step, signums

    def _send(self, place: str, state) -> None:
        if place == self._place and state.global_step == self._step:
            for signum in self._signums:
                os.kill(os.getpid(), signum)

    def on_step_begin(self, args, state, control, **_) -> None:
        self._send("begin of a step", state)

    def on_substep_end(self, args, state, control, **_) -> None:
        self._send("middle of a step", state)

    def on_pre_optimizer_step(self, args, state, control, **_) -> None:
        self._send("optimizer", state)

    def on_step_end(self, args, state, control, **_) -> None:
        self._send("end of a step", state)


@pytest.mark.parametrize(
    "place",
    [
        "middle of a step",
        "optimizer",
        *(pytest.param(f"{end} of a step", marks=pytest.mark.slow) for end in ("begin", "end")),
    ],
)
def test_a_signal_anywhere_saves_the_last_step_and_the_resumed_run_equals_an_unbroken_one(
    tiny_dataset, forgetful, tmp_path, place
):
    unbroken = train(config_of(tiny_dataset, forgetful, tmp_path / "unbroken"))
    config = config_of(tiny_dataset, forgetful, tmp_path / "run")
    with pytest.raises(Interrupted, match=r"The checkpoint of step [345] is kept; re-run the same command") as ended:
        train(config, callbacks=[SignalAt(place, 4, signal.SIGTERM)])
    assert ended.value.exit_code == 143
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.step == (5 if place == "optimizer" else 4)
    assert train(config).targets == unbroken.targets
    require_equal_weights(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_exit_code_names_the_signal(tiny_dataset, tiny_student, tmp_path, signum, not_ignored):
    with pytest.raises(Interrupted) as ended:
        train(config_of(tiny_dataset, tiny_student, tmp_path / "run"), callbacks=[SignalAt("end of a step", 1, signum)])
    assert ended.value.exit_code == 128 + signum
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the handlers of the program are restored"


def test_a_second_signal_ends_at_once_and_keeps_the_older_checkpoint(tiny_dataset, tiny_student, tmp_path):
    config = config_of(tiny_dataset, tiny_student, tmp_path / "run", save_steps=2)
    twice = SignalAt("begin of a step", 3, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(Interrupted, match="The checkpoint of step 2 is kept"):
        train(config, callbacks=[twice])
    assert newest_checkpoint(tmp_path / "run").step == 2


def test_before_the_first_step_there_is_nothing_to_save(tiny_dataset, tiny_student, tmp_path):
    config = config_of(tiny_dataset, tiny_student, tmp_path / "run")
    with pytest.raises(Interrupted, match="No optimizer step was saved yet; re-run the same command"):
        train(config, callbacks=[SignalAt("begin of a step", 0, signal.SIGTERM)])
    assert newest_checkpoint(tmp_path / "run") is None
    assert train(config).steps == 8


def test_a_step_that_outlasts_the_grace_period_is_left(tiny_dataset, tiny_student, tmp_path):
    class Endless(SignalAt):
        def on_step_begin(self, args, state, control, **_) -> None:
            super().on_step_begin(args, state, control)
            if state.global_step == 3:
                time.sleep(60)

    config = config_of(tiny_dataset, tiny_student, tmp_path / "run", save_steps=2, grace_s=0.5)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="The checkpoint of step 2 is kept"):
        train(config, callbacks=[Endless("begin of a step", 3, signal.SIGTERM)])
    assert time.monotonic() - began < 30


def test_a_measurement_that_is_due_is_made_before_the_checkpoint(tiny_dataset, tiny_student, tmp_path):
    """The resumed run would not repeat it, and would choose another best step."""
    shape = {"eval_steps": 2, "best_metric": "eval_cross_entropy"}
    config = config_of(tiny_dataset, tiny_student, tmp_path / "run", eval_dataset=str(tiny_dataset), **shape)
    unbroken = config.model_copy(update={"output": str(tmp_path / "unbroken")})
    wanted = train(unbroken)
    with pytest.raises(Interrupted):
        train(config, callbacks=[SignalAt("optimizer", 3, signal.SIGTERM)])
    assert train(config).student_step == wanted.student_step
    histories = [
        [line for line in json.loads((run / "trainer_state.json").read_text())["log_history"] if "eval_loss" in line]
        for run in (tmp_path / "run", tmp_path / "unbroken")
    ]
    assert [line["eval_loss"] for line in histories[0]] == [line["eval_loss"] for line in histories[1]]


def test_the_grace_period_of_several_devices_ends_with_the_measurement_and_not_in_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr("coldstill.trainer.interruption.reduce", lambda received, _: received)
    args = SimpleNamespace(world_size=2, device="cpu", gradient_accumulation_steps=1)
    state, control = TrainerState(global_step=0), TrainerControl(should_evaluate=True)
    with CheckpointOnSignal(grace_s=0.5) as on_signal:
        on_signal.on_train_begin(args, state, control)
        os.kill(os.getpid(), signal.SIGTERM)
        state.global_step = 1
        on_signal.on_step_end(args, state, control)
        control.should_evaluate = False
        on_signal.on_evaluate(args, state, control)
        time.sleep(1)  # the checkpoint is written
        with pytest.raises(Interrupted, match="The checkpoint of step 1 is kept"):
            on_signal.on_save(args, state, control)


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_command_ends_with_a_sentence_and_the_exit_code_and_resumes(tiny_dataset, forgetful, tmp_path, signum):
    """Sent to the whole process group, as a terminal and Slurm do: the loader's processes get it too."""
    config = config_of(tiny_dataset, forgetful, tmp_path / "run", dataloader_workers=1)
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()))
    command = [sys.executable, "-m", "tests.trainer.slow_run", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("micro-batch after step 2"):
            break
    os.killpg(process.pid, signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, err
    assert "is kept; re-run the same command to resume." in err
    assert "Traceback" not in err
    assert train(config).steps == 8
    train(config_of(tiny_dataset, forgetful, tmp_path / "unbroken"))
    require_equal_weights(tmp_path / "run", tmp_path / "unbroken")


def test_a_loaders_process_outlives_a_sigterm_and_ends_with_its_loader(tiny_dataset, tmp_path):
    stream = load_logit_dataset(tiny_dataset, cache_dir=tmp_path / "cache").stream(batch_size=2, seed=0, epochs=1)
    wanted = sum(1 for _ in stream)
    arguments = TrainingArguments(output_dir=str(tmp_path), dataloader_num_workers=2, use_cpu=True)
    others = psutil.Process().children()  # of other tests: multiprocessing's own process never ends at a SIGTERM
    batches = iter(BatchLoader(stream, arguments))
    found = [next(batches)]
    workers = [process for process in psutil.Process().children() if process not in others]
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    found += batches
    assert len(found) == wanted
    del batches
    assert psutil.wait_procs(workers, timeout=20)[1] == []
