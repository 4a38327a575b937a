"""Runs rounds: each part that is not done, one after the other, as a child process.

A part is an ordinary `coldstill` command, so its engine's memory is free when it ends, and one GPU is enough for both
models. After a kill of this process or of a part, the same call resumes: done parts are passed over, and an unfinished
one resumes by itself. A lock file is held by this process and its child, so that no second part starts beside one that
is still ending.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from rich.console import Console

from coldstill.common.config_file import check_config
from coldstill.common.errors import ColdstillError
from coldstill.common.files import SUMMARY_NAME, read_json, write_json
from coldstill.common.interrupts import as_interrupted, end_with_parent, raising_interrupts
from coldstill.common.models import FrozenModel
from coldstill.pipeline.config import CaptureConfig
from coldstill.storage_schema.store import require_folder
from coldstill.trainer.config import FREE_TRAINING_SETTINGS, TrainConfig

from .checks import require_usable_models
from .config import MAX_ROUNDS, RoundsConfig
from .parts import HEADINGS, Part, part_folder, parts_of, stated_teacher, student_folder

RECORD_NAME = "rounds.json"
LOCK_NAME = "rounds.lock"
PROGRAM = "coldstill"
"""The module that runs a part."""
_WAIT_S = 300.0
"""Seconds that a new start waits for the last part of a killed one: training writes a checkpoint before it ends."""
_FREE: dict[str, set[str]] = {
    "training": {*FREE_TRAINING_SETTINGS},
    "data": {"cache_dir", "cache_bytes"},
    "student": {"gradient_checkpointing"},
}
"""Settings that change no dataset and no weight, and may differ between two starts."""
_DEFAULT = "its default"
"""What a record shows for a setting that it does not state."""


class RoundsChanged(ColdstillError):
    """The output folder holds rounds with other settings.

    Fix: restore the setting, or choose another output. `cluster` may change, and `rounds` may be raised.
    """


class RoundsDamaged(ColdstillError):
    """The record of rounds cannot be read.

    Fix: delete this file and re-run `coldstill rounds` with the configuration of these rounds.
    """


class RoundsRunning(ColdstillError):
    """Another process runs rounds in this folder.

    Fix: wait for it, or end it first; `coldstill status FOLDER` shows its progress.
    """


class PartFailed(ColdstillError):
    """The command of a part ended with an exit code other than 0.

    Fix: fix the error that the part printed, and re-run the same command to resume: finished parts are kept.
    """


class RoundsSummary(BaseModel):
    """The finished rounds."""

    rounds: int
    student: str = Field(description="Folder of the last round's student.")
    dataset_ids: list[str] = Field(description="Datasets that the last round trained on, of all rounds.")
    loss: str
    steps: int = Field(description="Optimizer steps of all rounds.")
    targets: int = Field(description="Target positions that were trained on, in all rounds.")


def run_rounds(config: RoundsConfig, *, console: Console | None = None) -> RoundsSummary:
    """Run the parts that are not done and return what was made. Safe to call again after any kill.

    Ctrl-C and SIGTERM end the running part and raise `Interrupted`. Raises `RoundsChanged`, `RoundsRunning`,
    `RoundsDamaged`, `PartFailed`, and what `checked_parts` raises.
    """
    console = console or Console(highlight=False)
    parts, output = checked_parts(config), Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with raising_interrupts(), _locked(output) as lock:
        _claim(config, parts)
        for part in parts:
            done = "  [dim]already done[/dim]" if part.is_done else ""
            console.print(
                f"[bold]{part.title} ({part.round + 1} of {config.rounds})[/bold]  {HEADINGS[part.name]}{done}",
                soft_wrap=True,
            )
            if not part.is_done:
                part.write_config()
                _run(part, lock=lock)
    return _summary(config)


def checked_parts(config: RoundsConfig) -> list[Part]:
    """All parts, in their order. Raises `UnsupportedStore` for an output that is no folder, `ConfigInvalid` for
    settings that a part refuses, and what `require_usable_models` raises."""
    require_folder(config.output)
    parts = parts_of(config)
    for part in (*parts[:3], *parts[-3:]):  # those between differ in paths, and their seeds are smaller than the last
        check_config(part.settings, model=_model_of(part), where=part.title)
    require_usable_models(config, parts)
    return parts


def _run(part: Part, *, lock: int) -> None:
    """Run the command of a part to its end; it inherits the terminal and the lock.

    The part is in a session of its own: Ctrl-C reaches this process only, which passes each signal on once.
    """
    command = [sys.executable, "-m", PROGRAM, part.command, str(part.config_path)]
    child = subprocess.Popen(command, pass_fds=(lock,), start_new_session=True, preexec_fn=end_with_parent)
    try:
        code = child.wait()
    except KeyboardInterrupt as error:
        child.send_signal(as_interrupted(error).signum)
        child.wait()
        raise
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if code != 0 or not part.is_done:
        keys = " (its teacher is the student here: keys of `writer`)" if part.name == "answers" else ""
        raise PartFailed(
            f"{part.title}: {part.words}",
            found=_ending(code),
            wanted="exit code 0",
            fix=f"fix the error that the part printed{keys} and re-run the same command to resume: what is finished "
            "is kept",
        )


def _ending(code: int) -> str:
    """How a command ended, by its exit code; a negative one is a signal's number."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", as by the kernel when memory runs out" if name == "SIGKILL" else "")


def _summary(config: RoundsConfig) -> RoundsSummary:
    output, last = Path(config.output), config.rounds - 1
    runs = [read_json(part_folder(output, number, "train") / SUMMARY_NAME) for number in range(config.rounds)]
    return RoundsSummary(
        rounds=config.rounds,
        student=str(student_folder(output, last)),
        dataset_ids=runs[last]["dataset_ids"],
        loss=runs[last]["loss"],
        steps=sum(run["steps"] for run in runs),
        targets=sum(run["targets"] for run in runs),
    )


# The folder


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Hold the lock of the folder; gives its file descriptor. Raises `RoundsRunning`."""
    descriptor = os.open(output / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, output)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, output: Path) -> None:
    """Wait for the last part of a dead process; another process that is alive is an error."""
    started = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pid, _, host = os.pread(descriptor, 1024, 0).decode(errors="replace").strip().partition(" ")
        if _is_alive(pid, host) or time.monotonic() - started > _WAIT_S:
            raise RoundsRunning(
                f"{output}: {LOCK_NAME}",
                found=f"the lock is held; it was taken by process {pid} on {host}",
                wanted="no other process that runs rounds in this folder",
                fix=f"wait for it (`coldstill status {output}` shows its progress), or end it first",
            )
        if time.monotonic() - started < 0.2:
            print("Waiting for the last part of an earlier start to end.", file=sys.stderr)
        time.sleep(0.2)


def _is_alive(pid: str, host: str) -> bool:
    """Whether the process that took the lock runs; one of another machine counts as running."""
    if host and host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _claim(config: RoundsConfig, parts: list[Part]) -> None:
    """Record the settings at the first start, and compare them at later ones; without a record, with those of parts.

    Raises `RoundsChanged`, `RoundsDamaged`.
    """
    path, settings = Path(config.output) / RECORD_NAME, _identity(config)
    if path.exists():
        _require_unchanged(path, read_record(path.parent)[1], settings, started="these rounds were")
        begun = sum(1 for number in range(MAX_ROUNDS) if part_folder(path.parent, number, "answers").exists())
        if begun > config.rounds:
            raise RoundsChanged(
                f"{path}: rounds",
                found=config.rounds,
                wanted=f"at least {begun}, the number of rounds that were begun",
                fix=f"set rounds to {begun} or more, or choose another output",
            )
    else:
        _require_settings_of_parts(parts)
    write_json(path, {"rounds": config.rounds, "settings": settings})


def read_record(output: Path) -> tuple[int, dict[str, Any]]:
    """Number of rounds and settings of the last start. Raises `RoundsDamaged`."""
    path = output / RECORD_NAME
    try:
        document = read_json(path)
        rounds = int(document["rounds"])
        if not 1 <= rounds <= MAX_ROUNDS:
            raise ValueError(f"{rounds} rounds, not 1 to {MAX_ROUNDS}")
        return rounds, dict(document["settings"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise RoundsDamaged(
            str(path),
            found=f"{type(error).__name__}: {error}",
            wanted="the record of `coldstill rounds`",
            fix="delete this file and re-run `coldstill rounds` with the configuration of these rounds: it is compared "
            "with the settings of their parts",
        ) from None


def _require_settings_of_parts(parts: list[Part]) -> None:
    """Raise `RoundsChanged` if a part was started with other settings, by the file beside its folder."""
    for part in parts:
        if part.config_path.exists():
            before, now = (_fixed(part, settings) for settings in (part.started_with(), part.settings))
            _require_unchanged(part.config_path, before, now, started="this part was")


def _fixed(part: Part, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a part's settings that may not differ between two starts, without defaults. Raises `ConfigInvalid`."""
    checked = check_config(settings, model=_model_of(part), where=str(part.config_path))
    exclude: dict[str, Any] = {"cluster": True, **(_FREE if part.name == "train" else {})}
    return _without_defaults(checked, exclude)


def _model_of(part: Part) -> Any:
    return TrainConfig if part.command == "train" else CaptureConfig


def _identity(config: RoundsConfig) -> dict[str, Any]:
    """The settings that decide the datasets and the weights, without those that have their default value."""
    exclude: dict[str, Any] = {"output": True, "rounds": True, "cluster": True, **_FREE}
    return {**_without_defaults(config, exclude), "teacher": stated_teacher(config.teacher)}


def _without_defaults(config: FrozenModel, exclude: dict[str, Any]) -> dict[str, Any]:
    stated = config.model_dump(mode="json", exclude_defaults=True, exclude=exclude)
    return {name: value for name, value in stated.items() if value != {}}


def _require_unchanged(path: Path, before: dict[str, Any], now: dict[str, Any], *, started: str) -> None:
    """Raise `RoundsChanged` if the settings `now` are not those `before`, which `path` holds."""
    difference = _first_difference("", before, now)
    if difference is not None:
        key, found_before, found_now = difference
        raise RoundsChanged(
            f"{path}: {key}",
            found=found_now,
            wanted=f"{found_before}, as when {started} started",
            fix="restore the setting, or choose another output; rounds and cluster may be changed",
        )


def _first_difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """The innermost key, and its two values, at which two settings differ; an absent one is its default."""
    if before == now:
        return None
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return name, before, now
    key = next(key for key in sorted({*before, *now}) if before.get(key, _DEFAULT) != now.get(key, _DEFAULT))
    return _first_difference(f"{name}.{key}".lstrip("."), before.get(key, _DEFAULT), now.get(key, _DEFAULT))
