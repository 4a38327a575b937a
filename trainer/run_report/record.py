"""`report.json` of a run: all that its page shows, and what `coldstill compare` reads.

A run of an earlier release has none; its record is made of its newest checkpoint.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from coldstill.common.charts import Point
from coldstill.common.files import did_you_mean
from coldstill.common.models import MAX_DOCUMENT_BYTES, FrozenModel, flat, parse_document, too_dense
from coldstill.trainer.errors import RunDamaged, RunNotFound

RECORD_NAME, PAGE_NAME = "report.json", "report.html"
MOST_LINES = 100_000
"""Of a longer log, evenly spaced lines are kept: more would not be read, see `MAX_DOCUMENT_BYTES`."""

MOST_STEPS = 1 << 53
MAX_NUMBER = 1e100
"""Larger numbers of a log are left out: no figure has them, and differences of them overflow."""

_WANTED = f"a JSON document of at most {MAX_DOCUMENT_BYTES:,} bytes, as `coldstill train` writes it"
_FIX = "re-run the training with the same settings, which writes the file again, or leave this run out"

_PASSWORD = re.compile(r"://[^/@\s]+:[^/@\s]*@")

State = Literal["running", "interrupted", "failed", "finished"]


class RunRecord(FrozenModel):
    """A run at one moment."""

    state: State
    error: str | None = Field(default=None, description="The error that ended the run.")
    written: float | None = Field(default=None, description="Unix time of this record.")
    longest_gap_s: float | None = Field(
        default=None, description="Most seconds between two records of this start: a longer silence means a killed run."
    )
    step: int = Field(ge=0, le=MOST_STEPS, description="Optimizer steps taken.")
    max_steps: int = Field(ge=0, le=MOST_STEPS, description="Optimizer steps of the whole run.")
    time_left_s: float | None = None
    facts: dict[str, dict[str, str]] = Field(default={}, description="Sections of named facts, as text.")
    settings: dict[str, JsonValue] = Field(default={}, description="All settings, `section.key` to value.")
    changed: tuple[str, ...] = Field(default=(), description="Settings that differ from their default.")
    resumed: tuple[Annotated[int, Field(ge=0, le=MOST_STEPS)], ...] = Field(
        default=(), description="Steps from which the run was resumed."
    )
    summary: dict[str, JsonValue] = Field(default={}, description="`train_summary.json` of a finished run.")
    log: tuple[dict[str, JsonValue], ...] = ()

    def points(self, name: str) -> list[Point]:
        """Step and value of the lines that hold the finite number `name`, by step."""
        found = {}
        for line in self.log:
            step, value = _number(line.get("step")), _number(line.get(name))
            if step is not None and value is not None and step >= 0:
                found[step] = value
        return sorted(found.items())

    def names(self, prefix: str) -> list[str]:
        """Names of the log that begin with `prefix`, in the order of their first line."""
        return list(dict.fromkeys(name for line in self.log for name in line if name.startswith(prefix)))

    def last(self, name: str) -> float | None:
        """The last value of `name`."""
        points = self.points(name)
        return points[-1][1] if points else None

    def late(self, name: str) -> float | None:
        """The mean of the last tenth of the values of `name`."""
        points = self.points(name)
        tail = points[-max(1, len(points) // 10) :]
        return sum(value for _, value in tail) / len(tail) if tail else None


def spread(log: Sequence[Mapping[str, Any]], most: int = MOST_LINES) -> list[Mapping[str, Any]]:
    """About `most` evenly spaced lines of a log, the last one and those of evaluations."""
    every = max(1, -(-len(log) // most))
    return [
        line
        for number, line in enumerate(log, start=1 - len(log))
        if number % every == 0 or any(name.startswith("eval_") for name in line)
    ]


def without_password(value: Any) -> Any:
    """A setting without the names and passwords that its addresses hold, such as `https://NAME:PASSWORD@host`: a report
    is made to be shown."""
    if isinstance(value, Mapping):
        return {name: without_password(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_password(one) for one in value]
    return _PASSWORD.sub("://…@", value) if isinstance(value, str) else value


def read_run(folder: Path) -> RunRecord:
    """The record of the run in `folder`, also of one that is not finished.

    Raises `RunNotFound` for a folder without a run or without a logged step, or that cannot be read, and `RunDamaged`.
    """
    try:
        return _read_run(folder)
    except OSError as error:
        raise _not_found(folder, error.strerror or str(error)) from None


def _read_run(folder: Path) -> RunRecord:
    if not folder.is_dir():
        raise _not_found(folder, "no such folder" if not folder.exists() else "a file")
    if (folder / RECORD_NAME).exists():
        return parse_document(
            _bytes(folder / RECORD_NAME), model=RunRecord, where=str(folder / RECORD_NAME), error=RunDamaged
        )
    states = [folder / "trainer_state.json", *sorted(folder.glob("checkpoint-*/trainer_state.json"), key=_step)[::-1]]
    state = next((path for path in states if path.exists()), None)
    if state is None:
        listed = sorted(path.name for path in folder.iterdir())[:5]
        raise _not_found(folder, f"a folder with {', '.join(listed)}" if listed else "an empty folder")
    return _of_checkpoint(folder, state)


def _of_checkpoint(folder: Path, state: Path) -> RunRecord:
    found = json_object(state)
    summary = json_object(folder / "train_summary.json") if (folder / "train_summary.json").exists() else {}
    identity = json_object(folder / "run.json") if (folder / "run.json").exists() else {}
    ids = identity.pop("dataset_ids", None) or summary.get("dataset_ids") or []
    teachers = summary.get("teachers") or []
    facts = {}
    if isinstance(ids, list) and isinstance(teachers, list):
        facts["Dataset"] = {"dataset id": ", ".join(map(str, ids)), "teacher": ", ".join(map(str, teachers))}
    try:
        return RunRecord(
            state="finished" if summary else "interrupted",
            step=found.get("global_step"),
            max_steps=found.get("max_steps"),
            facts=facts,
            settings=flat(identity),
            summary=summary,
            log=found.get("log_history"),
        )
    except ValueError:
        raise _damaged(state, "a document without global_step, max_steps and log_history") from None


def json_object(path: Path, *, wanted: str = _WANTED, fix: str = _FIX) -> dict[str, Any]:
    """The JSON object in a file of at most `MAX_DOCUMENT_BYTES`.

    Raises `RunDamaged` with what is `wanted` there and a `fix`.
    """
    found: object
    data = _bytes(path, wanted=wanted, fix=fix)
    if dense := too_dense(data):
        raise _damaged(path, dense, wanted=wanted, fix=fix)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise _damaged(path, "text that is not JSON", wanted=wanted, fix=fix) from None
    if not isinstance(found, dict):
        raise _damaged(path, f"a JSON {type(found).__name__}", wanted=wanted, fix=fix)
    return found


def _bytes(path: Path, *, wanted: str = _WANTED, fix: str = _FIX) -> bytes:
    try:
        there = path.stat()
        if not stat.S_ISREG(there.st_mode):  # reading a pipe may never end, and a device may fill the memory
            raise _damaged(path, "a folder, device, pipe or socket", wanted=wanted, fix=fix)
        if there.st_size > MAX_DOCUMENT_BYTES:
            raise _damaged(path, f"{there.st_size:,} bytes", wanted=wanted, fix=fix)
        with path.open("rb") as file:
            return file.read(MAX_DOCUMENT_BYTES)
    except OSError as error:
        raise _damaged(path, error.strerror, wanted=wanted, fix=fix) from None


def _damaged(path: Path, found: object, *, wanted: str = _WANTED, fix: str = _FIX) -> RunDamaged:
    return RunDamaged(str(path), found=found, wanted=wanted, fix=fix)


def _not_found(folder: Path, found: str) -> RunNotFound:
    return RunNotFound(
        str(folder),
        found=found,
        wanted=f"the output of a training, with {RECORD_NAME} or a checkpoint",
        fix=did_you_mean(folder) or "give the folder that the configuration of `coldstill train` names as output",
    )


def _step(path: Path) -> int:
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() and number.isascii() and len(number) < 19 else -1


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if abs(value) <= MAX_NUMBER else None
    except OverflowError:
        return None


def numbers(document: Mapping[str, Any], *, skip: Sequence[str] = ()) -> dict[str, float]:
    """The finite numbers at the top level of a document."""
    found = {name: _number(value) for name, value in document.items() if name not in skip}
    return {name: value for name, value in found.items() if value is not None}
