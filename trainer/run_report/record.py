"""`report.json` of a run: all that its page shows, and what `coldstill compare` reads.

A run of an earlier release has none; its record is made of its newest checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from coldstill.common.charts import Point
from coldstill.common.models import FrozenModel, flat, parse_document
from coldstill.trainer.errors import RunDamaged, RunNotFound

RECORD_NAME, PAGE_NAME = "report.json", "report.html"
MAX_BYTES = 64 << 20
"""A larger file is not read: the log of a million lines is larger."""

MOST_STEPS = 1 << 53
MAX_NUMBER = 1e100
"""Larger numbers of a log are left out: no figure has them, and differences of them overflow."""

_WANTED = f"a JSON document of at most {MAX_BYTES:,} bytes, as `coldstill train` writes it"
_FIX = "re-run the training with the same settings, which writes the file again, or leave this run out"

State = Literal["running", "interrupted", "failed", "finished"]


class RunRecord(FrozenModel):
    """A run at one moment."""

    state: State
    error: str | None = Field(default=None, description="The error that ended the run.")
    written: float | None = Field(default=None, description="Unix time of this record.")
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


def read_run(folder: Path) -> RunRecord:
    """The record of the run in `folder`, also of one that is not finished.

    Raises `RunNotFound` for a folder without a run or without a logged step, and `RunDamaged`.
    """
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
    """The JSON object in a file of at most `MAX_BYTES`. Raises `RunDamaged` with what is `wanted` there and a `fix`."""
    found: object
    try:
        found = json.loads(_bytes(path, wanted=wanted, fix=fix))
    except (ValueError, RecursionError):
        raise _damaged(path, "text that is not JSON", wanted=wanted, fix=fix) from None
    if not isinstance(found, dict):
        raise _damaged(path, f"a JSON {type(found).__name__}", wanted=wanted, fix=fix)
    return found


def _bytes(path: Path, *, wanted: str = _WANTED, fix: str = _FIX) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise _damaged(path, f"{size:,} bytes", wanted=wanted, fix=fix)
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror, wanted=wanted, fix=fix) from None


def _damaged(path: Path, found: object, *, wanted: str = _WANTED, fix: str = _FIX) -> RunDamaged:
    return RunDamaged(str(path), found=found, wanted=wanted, fix=fix)


def _not_found(folder: Path, found: str) -> RunNotFound:
    return RunNotFound(
        str(folder),
        found=found,
        wanted=f"the output of a training, with {RECORD_NAME} or a checkpoint",
        fix="give the folder that the configuration of `coldstill train` names as output",
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
