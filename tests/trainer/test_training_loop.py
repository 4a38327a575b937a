"""One loader gives the batches of a run, and callbacks see its epochs; those of evaluations give each row once."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from coldstill import load_logit_dataset
from coldstill.storage_schema.dataset import open_dataset
from coldstill.trainer.errors import LoaderWorkerDied, UnsupportedArgument
from coldstill.trainer.training_loop import BatchLoader
from tests.trainer.training import arguments, build


class Epochs(TrainerCallback):
    """Records the events of epochs and steps, and asks for something at the end of the first epoch."""

    def __init__(self, *, ask: str | None = None):
        self.ask, self.events = ask, []

    def on_epoch_begin(self, args, state, control, **_) -> None:
        self.events.append(("begin", state.global_step))

    def on_epoch_end(self, args, state, control, **_) -> None:
        self.events.append(("end", state.global_step))
        if self.ask is not None:
            setattr(control, self.ask, True)
            self.ask = None

    def on_train_begin(self, args, state, control, **_) -> None:
        self.planned = state.num_train_epochs


def test_each_epoch_begins_and_ends_once_also_in_a_resumed_run(tiny_dataset, tiny_student, tmp_path):
    shape = {"num_train_epochs": 2.5, "gradient_accumulation_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, events = Epochs(), [("begin", 0), ("end", 2), ("begin", 2), ("end", 3), ("begin", 3), ("end", 4)]
    trainer, gradients = build(tiny_dataset, tiny_student, tmp_path, callbacks=[whole], **shape)
    trainer.train()
    assert (whole.planned, whole.events) == (3, events)
    assert trainer.state.epoch == 2.5
    rest = Epochs()
    resumed, again = build(tiny_dataset, tiny_student, tmp_path, callbacks=[rest], **shape)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.events == events[2:]
    for got, want in zip(again.steps, gradients.steps[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_what_a_callback_asks_for_at_the_end_of_an_epoch_is_done(tiny_dataset, tiny_student, tmp_path):
    wanted = {"should_training_stop": (6, []), "should_save": (12, ["checkpoint-6"]), "should_evaluate": (12, [])}
    for ask, (steps, saved) in wanted.items():
        dataset = load_logit_dataset(tiny_dataset)
        trainer, _ = build(
            dataset, tiny_student, tmp_path / ask, callbacks=[Epochs(ask=ask)], num_train_epochs=2, eval_dataset=dataset
        )
        trainer.train()
        assert trainer.state.global_step == steps
        assert [folder.name for folder in (tmp_path / ask).glob("checkpoint-*")] == saved
        assert any("eval_loss" in line for line in trainer.state.log_history) == (ask == "should_evaluate")
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, callbacks=[Epochs(ask="should_epoch_stop")])
    with pytest.raises(UnsupportedArgument, match="should_training_stop"):
        trainer.train()


def test_loaders_of_an_evaluation_give_every_row_once_and_predict_names_evaluate(tiny_dataset, tiny_student, tmp_path):
    dataset = load_logit_dataset(tiny_dataset)
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, eval_dataset={"a": dataset, "b": dataset})
    wanted = [row.sample_id for row in open_dataset(tiny_dataset).rows()]
    loaders = [
        trainer.get_eval_dataloader("a"), trainer.get_eval_dataloader(dataset), trainer.get_test_dataloader(dataset)
    ]  # fmt: skip
    for loader in loaders:
        assert [name for batch in loader for name in batch["sample_ids"]] == wanted
    assert trainer.evaluate("b")["eval_loss"] == trainer.evaluate(dataset)["eval_loss"]
    for enter, found in (
        (trainer.get_eval_dataloader, "'a', 'b'"),
        (lambda: trainer.get_eval_dataloader("c"), "'a', 'b'"),
        (lambda: trainer.predict(dataset), "evaluate"),
    ):
        with pytest.raises(UnsupportedArgument, match=found):
            enter()


def test_a_process_that_ends_while_its_batch_is_fetched_is_named(tiny_dataset, tmp_path, monkeypatch):
    """torch then raises what the socket to it says."""
    stream = load_logit_dataset(tiny_dataset).stream(batch_size=2, seed=0)
    loader = BatchLoader(stream, arguments(tmp_path, dataloader_num_workers=1))
    inner = torch.utils.data.dataloader._MultiProcessingDataLoaderIter

    def reset(self):
        raise ConnectionResetError(104, "Connection reset by peer")

    def killed(self):
        for process in self._workers:
            process.kill()
        reset(self)

    for fault, error in ((reset, ConnectionResetError), (killed, LoaderWorkerDied)):
        with monkeypatch.context() as patch:
            patch.setattr(inner, "_next_data", fault)
            with pytest.raises(error):
                next(iter(loader))


UNCAUGHT = """
import sys
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any
from coldstill import load_logit_dataset
from coldstill.trainer.training_loop import BatchLoader
from tests.trainer.training import arguments

if __name__ == "__main__":
    dataset = load_logit_dataset(Path(sys.argv[1]))
    args = arguments(Path(sys.argv[2]), dataloader_num_workers=2)
    batches = iter(BatchLoader(dataset.stream(batch_size=2, seed=0), args))
    next(batches)
    raise KeyError("uncaught")
"""


def test_a_script_that_an_uncaught_error_ends_waits_for_no_process(tiny_dataset, tmp_path):
    """The loader's processes outlive SIGTERM, which multiprocessing sends at the end before it waits for them."""
    script = tmp_path / "script.py"
    script.write_text(UNCAUGHT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(tiny_dataset), str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "KeyError: 'uncaught'" in ended.stderr


def leave_out_targets(trainer: Any, micro_batches: set[int]) -> None:
    """Let these micro-batches, counted from 0, be of rows that were all skipped."""
    inner, number = trainer.get_batch_samples, count()

    def emptied(batch: dict[str, Any]) -> dict[str, Any]:
        if next(number) not in micro_batches:
            return batch
        return {**batch, "targets": batch["targets"].part(0, 0), "target_samples": batch["target_samples"][:0]}

    trainer.get_batch_samples = lambda batches, *rest: inner(map(emptied, batches), *rest)


class State(TrainerCallback):
    """Keeps the weights and the optimizer's state after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_) -> None:
        self.steps.append(deepcopy({"weights": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_a_step_without_targets_changes_neither_weights_nor_momentum(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, optimizer: str
) -> None:
    seen = State()
    settings = {"optim": optimizer, "weight_decay": 0.1, "optim_args": "momentum=0.9"}
    if optimizer != "sgd":
        del settings["optim_args"]
    trainer, _ = build(
        tiny_dataset, tiny_student, tmp_path, callbacks=[seen], max_steps=3, gradient_accumulation_steps=2, **settings
    )
    leave_out_targets(trainer, {2, 3})
    trainer.train()
    first, empty, last = seen.steps
    torch.testing.assert_close(empty, first, rtol=0, atol=0)
    assert any(not torch.equal(last["weights"][name], empty["weights"][name]) for name in last["weights"])
    assert trainer.state.global_step == 3


def test_micro_batches_without_targets_add_nothing_to_a_step(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path
) -> None:
    trainer, found = build(tiny_dataset, tiny_student, tmp_path / "a", max_steps=1, gradient_accumulation_steps=2)
    leave_out_targets(trainer, {1})
    trainer.train()
    alone, wanted = build(tiny_dataset, tiny_student, tmp_path / "b", max_steps=1)
    alone.train()
    assert torch.equal(found.steps[0], wanted.steps[0])
