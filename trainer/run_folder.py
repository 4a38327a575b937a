"""The output folder of a run: which run it belongs to, its newest whole checkpoint, the one that is its student.

run.json               what this folder is a run of; another run is refused
checkpoint-<step>/     as transformers writes them
student/               the finished student: model and tokenizer files, loadable by `from_pretrained`, and its card
adapter/               only of a merged student: its adapters alone
trainer_state.json     the log of the whole run
report.md              the same for people: the curve of t, the losses, the measurements
train_summary.json     written last: its presence means finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.errors import StorageFull

from .early_stopping import has_stopped
from .errors import CheckpointMismatch

RUN_NAME = "run.json"
STATE_NAME = "trainer_state.json"
SUMMARY_NAME = "train_summary.json"
REPORT_NAME = "report.md"
STUDENT_FOLDER = "student"
ADAPTER_FOLDER = "adapter"
_FULL_BELOW = 1 << 20  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and the `trainer_state.json` in it."""

    folder: Path
    state: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the run's last step was taken."""
        return self.step >= int(self.state["max_steps"]) or has_stopped(self.state)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.state["global_step"])

    @property
    def best(self) -> Checkpoint:
        """Of the run up to here, the checkpoint with the best measurement; itself where no best one is kept."""
        best = self.state.get("best_model_checkpoint")
        folder = self.folder.parent / Path(best).name if best else self.folder
        state = read_state(folder)
        return self if state is None else Checkpoint(folder, state)


def claim(output: Path, identity: Mapping[str, Any], *, write: bool) -> None:
    """Make `output` the folder of the run that `identity` describes; without `write` only look whether it is.

    Raises `CheckpointMismatch` where it holds checkpoints or a student of another run.
    """
    output.mkdir(parents=True, exist_ok=True)
    occupied = newest_checkpoint(output) is not None or (output / SUMMARY_NAME).exists()
    if occupied:
        require_same(
            f"{output}: the run in this folder",
            _read_json(output / RUN_NAME) or {},
            identity,
            fix="choose another output, or delete this folder if its run is not needed",
        )
    if write:
        write_json(output / RUN_NAME, identity)


def require_same(what: str, before: Mapping[str, Any], now: Mapping[str, Any], *, fix: str) -> None:
    """Raise `CheckpointMismatch`, with what was found and is wanted of it, where two runs differ in anything."""
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differing:
        raise CheckpointMismatch(
            f"{what} differs in {', '.join(differing)}",
            found={key: before.get(key) for key in differing},
            wanted={key: now.get(key) for key in differing},
            fix=fix,
        )


def newest_checkpoint(output: Path) -> Checkpoint | None:
    """The checkpoint of the highest step that was written to its end; transformers writes its state file last."""
    for folder in sorted(output.glob("checkpoint-*"), key=_step, reverse=True):
        state = read_state(folder)
        if state is not None:
            return Checkpoint(folder, state)
    return None


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """The `trainer_state.json` in the folder of a checkpoint; None where there is none, or not a whole one."""
    return _read_json(checkpoint / STATE_NAME)


@contextmanager
def full_disk_named(output: Path) -> Iterator[None]:
    """Raise `StorageFull` for whatever a library raises when the disk of `output` has no room left."""
    try:
        yield
    except ColdstillError:
        raise
    except Exception as error:
        if "No space left" not in str(error) and shutil.disk_usage(output).free >= _FULL_BELOW:
            raise
        raise StorageFull(
            f"{output}: writing a checkpoint",
            found=str(error).strip().splitlines()[0],
            wanted="room for two checkpoints and the finished student",
            fix="free some room and start the same command again: it goes on from the last whole checkpoint",
        ) from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
