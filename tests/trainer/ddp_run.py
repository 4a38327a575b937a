"""The program of each of the two processes of `test_ddp.py`; with torchrun:
`torchrun --nproc_per_node 2 -m tests.trainer.ddp_run DATASET STUDENT OUTPUT [images | ensemble SECOND]`."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, TrainerCallback

from coldstill import load_logit_dataset
from coldstill.common.interrupts import Interrupted
from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.errors import NonFiniteLoss
from coldstill.trainer.interruption import CheckpointOnSignal
from coldstill.trainer.sharding import end_process_group
from tests.trainer.training import KillAt, Killed, Seen, build, make_sick, weights_of

SHAPE = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 1,
    "optim": "sgd",
    "learning_rate": 0.1,
    "save_strategy": "steps",
    "save_steps": 2,
}


class SignalEach(TrainerCallback):
    """SIGTERM for each process, as a scheduler sends it: for the second one after both have decided to stop."""

    def __init__(self, step: int):
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Signal the first process."""
        if args.process_index == 0 and state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Signal the second process."""
        if args.process_index == 1 and control.should_training_stop and state.global_step == self._step + 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    dataset: Path | LogitDataset,
    student: Path,
    output: Path,
    *,
    kill: int | None = None,
    end: int | None = None,
    **shape: Any,
) -> dict[str, Any]:
    """One start of a run, killed or signaled at a step; its results on this process."""
    held_out = load_logit_dataset(dataset) if isinstance(dataset, Path) else dataset.by_teacher[0]
    seen = Seen()
    callbacks: list[TrainerCallback] = [seen] if kill is None else [KillAt(kill), seen]
    on_signal = CheckpointOnSignal(grace_s=60)
    if end is not None:
        callbacks = [on_signal, SignalEach(end), seen]
    trainer, gradients = build(
        dataset, student, output, callbacks=callbacks, eval_dataset=held_out, **{**SHAPE, **shape}
    )
    seen.watch(trainer)
    try:
        with on_signal if end is not None else nullcontext():
            trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
    except Killed:
        return {}
    except Interrupted as error:
        return {"said": str(error)}
    return {
        "rows": seen.rows,
        "gradients": gradients.steps,
        "weights": weights_of(trainer.model),
        "schedule": trainer.record.schedule and trainer.record.schedule.state_dict(),
        "targets": trainer.record.targets,
        "epoch": trainer.state.epoch,
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "evaluation": {
            name: value for name, value in trainer.evaluate().items() if not name.endswith(("_second", "_runtime"))
        },
    }


def sick_row(dataset: Path, student: Path, output: Path) -> str:
    """The error message if a row on one process has a loss that is not finite."""
    stream = load_logit_dataset(dataset).stream(batch_size=2, seed=0, rank=1, world_size=2)
    token = int(next(iter(stream))["input_ids"][0, 0])
    trainer, _ = build(dataset, student, output, **SHAPE)
    make_sick(trainer.model, token=token)
    try:
        trainer.train()
    except NonFiniteLoss as error:
        return str(error)
    return ""


def train_on_images(dataset: Path, student: Path, output: Path, **shape: Any) -> dict[str, torch.Tensor]:
    """The weights after a run of a student that sees images, with gradient checkpointing."""
    model = AutoModelForImageTextToText.from_pretrained(student)
    trainer, _ = build(dataset, model, output, **{**SHAPE, "gradient_checkpointing": True, **shape})
    trainer.train()
    return weights_of(trainer.model)


def end(found: dict[str, Any], output: Path) -> None:
    """Write the results of this process, and leave the other one."""
    torch.save(found, output / f"rank-{torch.distributed.get_rank()}.pt")
    end_process_group()


def main() -> None:
    """Write the results of this process to OUTPUT."""
    dataset, student, output = map(Path, sys.argv[1:4])
    if sys.argv[4:] == ["images"]:
        end(train_on_images(dataset, student, output / "images"), output)
        return
    if sys.argv[4:5] == ["ensemble"]:
        end(train(load_logit_dataset(ensemble=[dataset, sys.argv[5]]), student, output / "ensemble"), output)
        return
    found: dict[str, Any] = {"unbroken": train(dataset, student, output / "unbroken")}
    train(dataset, student, output / "killed", kill=3)
    found["resumed"] = train(dataset, student, output / "killed")
    found["signaled"] = train(dataset, student, output / "signaled", end=2, save_steps=100)
    found["signaled, resumed"] = train(dataset, student, output / "signaled")
    found["sick"] = sick_row(dataset, student, output / "sick")
    end(found, output)


if __name__ == "__main__":
    main()
