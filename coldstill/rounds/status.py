"""Reads the status of rounds from their folder alone, and that of the part that is not done from its own files."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from coldstill.common.errors import ColdstillError
from coldstill.common.files import SUMMARY_NAME
from coldstill.common.models import FrozenModel
from coldstill.pipeline.driver.status import Status, read_status
from coldstill.storage_schema.errors import DatasetNotFound
from coldstill.trainer.run_report.record import RECORD_NAME as RECORD_NAME_OF_RUN
from coldstill.trainer.run_report.record import read_run

from .parts import HEADINGS, Part, PartName, part_folder, student_folder
from .run import LOCK_NAME, RECORD_NAME, read_record

State = Literal["running", "stopped", "finished"]
MEANING: dict[State, str] = {
    "running": "a part is running",
    "stopped": "no part is running: re-run the same command to resume",
    "finished": "all rounds are done",
}


class TrainingProgress(FrozenModel):
    """Steps of a training, and the seconds until it ends, null before its second step."""

    step: int
    max_steps: int
    time_left_s: float | None = None


class RoundsStatus(FrozenModel):
    """Rounds at one moment. `round` and `part`: the first that is not done; null once all are."""

    root: str
    state: State
    rounds: int = Field(description="Number of rounds.")
    rounds_done: int
    round: int | None = Field(default=None, description="Number of the round, from 0.")
    part: PartName | None = None
    capture: Status | None = Field(default=None, description="Status of the part, if it captures.")
    steps_done: int | None = Field(default=None, description="Step of the newest checkpoint of the part, if it trains.")
    training: TrainingProgress | None = Field(
        default=None, description="What the report of the part says, if it trains; at most some ten seconds old."
    )
    student: str | None = Field(default=None, description="The newest finished student.")

    @property
    def is_over(self) -> bool:
        """Whether nothing changes until the command runs again."""
        return self.state != "running"


def holds_rounds(root: str) -> bool:
    """Whether the folder is the output of `coldstill rounds`."""
    return "://" not in root and (Path(root) / RECORD_NAME).is_file()


def read_rounds_status(root: str) -> RoundsStatus:
    """The status of the rounds in a folder. Raises `RoundsDamaged`, and what `read_status` raises."""
    folder = Path(root)
    rounds, _ = read_record(folder)
    parts = [
        Part(round=number, name=name, folder=part_folder(folder, number, name), settings={})
        for number in range(rounds)
        for name in HEADINGS
    ]
    now = next((part for part in parts if not part.is_done), None)
    done = sum((part_folder(folder, number, "train") / SUMMARY_NAME).exists() for number in range(rounds))
    state: State = "finished" if now is None else "running" if _is_locked(folder) else "stopped"
    return RoundsStatus(
        root=root,
        state=state,
        rounds=rounds,
        rounds_done=done,
        round=now.round if now else None,
        part=now.name if now else None,
        capture=_capture(now) if now else None,
        steps_done=_steps(now) if now else None,
        training=_training(now) if now else None,
        student=str(student_folder(folder, done - 1)) if done else None,
    )


def _capture(part: Part) -> Status | None:
    if part.command != "capture" or not part.folder.exists():
        return None
    try:
        return read_status(str(part.folder))
    except DatasetNotFound:  # the part has just begun
        return None


def _steps(part: Part) -> int | None:
    if part.command != "train":
        return None
    names = [path.parent.name.rpartition("-")[2] for path in part.folder.glob("checkpoint-*/files.json")]
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


def _training(part: Part) -> TrainingProgress | None:
    if part.command != "train" or not (part.folder / RECORD_NAME_OF_RUN).is_file():
        return None
    try:
        found = read_run(part.folder)
    except ColdstillError:  # the status is not worse for a page that is damaged
        return None
    since = max(0.0, time.time() - found.written) if found.written is not None else 0.0
    left = None if found.time_left_s is None else max(0.0, found.time_left_s - since)
    return TrainingProgress(step=found.step, max_steps=found.max_steps, time_left_s=left)


def _is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of the folder: the driver, or a part that outlives it."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
