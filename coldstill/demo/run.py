"""`coldstill demo`: runs the stages in order and skips those whose results exist.

A demo that was killed resumes at the stage that was interrupted. Stages that need torch, Ray or vLLM run in child
processes; this process imports none of them. The peak memory that a stage reports is therefore its own. The stderr of a
child (progress bars) also goes to the terminal; its stdout goes to the log only.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from rich.console import Console

from coldstill.common.errors import ColdstillError
from coldstill.common.files import new_file, new_folder, read_json, write_json
from coldstill.common.interrupts import end_with_parent
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.store import require_folder

from .settings import LOSSES, DemoSize, Layout, capture_config, demo_engine, size_of, train_config
from .speed import speed_of, using_threads
from .summary import show, write_summary
from .text import write_text

STDERR_WAIT_S = 5.0
"""Seconds to wait for the end of a command's stderr: a grandchild may outlive the command and keep it open."""

LAST_LINES = 20
"""Number of lines of a failed command's output that its error quotes."""


class OutputOfAnotherSize(ColdstillError):
    """The output folder belongs to a demo of another size.

    Fix: choose another `--output`, delete the folder, or add or remove `--quick` as the message says.
    """


class StageFailed(ColdstillError):
    """A stage's command ended with an exit code other than 0.

    Fix: read the log that the message names, fix the cause, and run the demo again: it resumes with this stage.
    """


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the demo: `work` creates the paths `makes`; `heading` describes it to the user."""

    name: str
    heading: str
    makes: tuple[Path, ...]
    work: Callable[[], None]

    @property
    def done(self) -> bool:
        """Whether all of its paths exist."""
        return all(path.exists() for path in self.makes)


def run_demo(output: Path, *, quick: bool) -> None:
    """Run the missing stages of the demo in `output` and print its summary.

    A new demo first measures this machine, prints how long it will take, and uses one thread where that is faster.
    Raises `OutputOfAnotherSize`, or `StageFailed` with the last lines of the failed stage.
    """
    size = size_of(quick=quick)
    layout = Layout(output.resolve())
    engine = demo_engine()
    console = Console(highlight=False)
    if engine != "vllm":
        console.print(
            f"vLLM has no CPU wheel for {platform.system()} on {platform.machine()}: the teacher runs under the "
            f"{engine} engine instead, in the same Ray worker.",
            soft_wrap=True,
        )

    def text() -> None:
        with new_folder(layout.text) as folder:
            write_text(folder, distill_rows=size.distill_rows, held_out_rows=size.held_out_rows)

    models, measure = (f"coldstill.demo.{name}" for name in ("models", "measure"))
    stages = [
        Stage(
            name="text",
            heading="collects this machine's Python library, as raw text and as instruction pairs",
            makes=(layout.text,),
            work=text,
        ),
        Stage(
            name="teacher",
            heading="trains a tokenizer and a teacher from scratch",
            makes=(layout.tokenizer, layout.teacher),
            work=lambda: run_module("teacher", models, "teacher", layout=layout, quick=quick),
        ),
        Stage(
            name="student",
            heading="pre-trains a smaller student on the teacher's text",
            makes=(layout.student,),
            work=lambda: run_module("student", models, "student", layout=layout, quick=quick),
        ),
        *dataset_stages(
            layout, capture_config(layout, size, engine=engine), lambda loss: train_config(layout, size, loss=loss)
        ),
        Stage(
            name="measure",
            heading="measures the KL to the teacher, on files that no model was trained on",
            makes=(layout.measurements,),
            work=lambda: run_module("measure", measure, layout=layout, quick=quick),
        ),
        Stage(
            name="summary",
            heading="writes one table and one chart",
            makes=(layout.summary, layout.picture),
            work=lambda: write_summary(layout, size),
        ),
    ]

    def before_new(console: Console) -> AbstractContextManager[None]:
        speed = speed_of(_environment())
        if speed is None:
            return nullcontext()
        console.print(speed.sentence(quick=quick), soft_wrap=True)
        return using_threads(speed.threads)

    run_stages(stages, layout, size, quick=quick, show=show, before_new=before_new)


def run_stages(
    stages: Sequence[Stage],
    layout: Layout,
    size: DemoSize,
    *,
    quick: bool,
    show: Callable[..., None],
    before_new: Callable[[Console], AbstractContextManager[None]],
) -> None:
    """Run the missing stages in the layout's folder, then `show(layout, console, wall_s=)`.

    `before_new(console)` is called before the first stage of a new demo, which runs within what it returns.

    Raises `UnsupportedStore` for a root that is no folder, `OutputOfAnotherSize`, or `StageFailed` with the last lines
    of the failed stage.
    """
    console = Console(highlight=False)
    require_folder(layout.root)
    _claim(layout, size, quick=quick)
    bring_back(layout.teacher)
    is_new = not any(stage.done for stage in stages)
    with before_new(console) if is_new else nullcontext():
        _run_missing(stages, layout, console, show=show)


def _run_missing(stages: Sequence[Stage], layout: Layout, console: Console, *, show: Callable[..., None]) -> None:
    started = time.monotonic()
    for number, stage in enumerate(stages, start=1):
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        state = "  [dim]already done[/dim]" if stage.done else ""
        console.print(
            f"[bold]{number}/{len(stages)}[/bold] [dim]{minutes:2}:{seconds:02}[/dim]  "
            f"[bold]{stage.name}[/bold]  {stage.heading}{state}",
            soft_wrap=True,
        )
        if not stage.done:
            stage.work()
    show(layout, console, wall_s=time.monotonic() - started)


def _claim(layout: Layout, size: DemoSize, *, quick: bool) -> None:
    """Record the size in the output folder. Raises `OutputOfAnotherSize` if the folder has another one."""
    wanted = size.as_dict()
    if layout.size.exists():
        found = read_json(layout.size)
        if found != wanted:
            differing = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
            raise OutputOfAnotherSize(
                f"{layout.root} belongs to a demo of another size",
                found={key: found.get(key) for key in differing},
                wanted={key: wanted.get(key) for key in differing},
                fix=f"choose another --output, {'remove --quick' if quick else 'add --quick'}, or delete the folder",
            )
    layout.root.mkdir(parents=True, exist_ok=True)
    write_json(layout.size, wanted)


def run_module(stage: str, module: str, *arguments: str, layout: Layout, quick: bool) -> None:
    """Run a stage that is a module of its own, with the arguments `... OUTPUT [--quick]`."""
    run_stage(stage, module_command(module, *arguments, layout=layout, quick=quick), log=layout.log(stage))


def module_command(module: str, *arguments: str, layout: Layout, quick: bool) -> list[str]:
    """The command line of a stage that is a module of its own."""
    return [sys.executable, "-m", module, *arguments, str(layout.root), *(["--quick"] if quick else [])]


def dataset_stages(
    layout: Layout, capture_settings: dict[str, Any], train_settings: Callable[[str], dict[str, Any]]
) -> list[Stage]:
    """The stages from a teacher's folder to trained students; `train_settings(loss)` are those of one run."""
    coldstill = [sys.executable, "-m", "coldstill"]
    engine = capture_settings["teacher"]["engine"]
    shown = "vLLM" if engine == "vllm" else engine

    def run(stage: str, *arguments: str | Path) -> None:
        run_stage(stage, [*coldstill, *map(str, arguments)], log=layout.log(stage))

    def capture() -> None:
        _write_yaml(layout.capture_config, capture_settings)
        with new_file(layout.capture_summary) as beside:
            run("capture", "capture", layout.capture_config, "--summary", beside)

    def verify() -> None:
        run("verify", "verify", "--deep", layout.dataset)
        with new_file(layout.verified) as beside:
            beside.write_bytes(layout.log("verify").read_bytes())

    def card() -> None:
        with new_file(layout.page) as beside:
            run("page", "inspect", layout.dataset, "0", "--html", beside)
        run("card", "card", "--replace", layout.dataset)

    def train(loss: str) -> Callable[[], None]:
        def work() -> None:
            _write_yaml(layout.train_config(loss), train_settings(loss))
            with put_away(layout.teacher):
                before = layout.teacher.exists()
                run(f"train_{loss}", "train", layout.train_config(loss))
                write_json(
                    layout.teacher_presence(loss), {"teacher_before": before, "teacher_after": layout.teacher.exists()}
                )

        return work

    return [
        Stage(
            name="capture",
            heading=f"writes the teacher's top-k log-probs into Parquet shards, with Ray and {shown}",
            makes=(layout.dataset / MANIFEST_NAME, layout.capture_summary),
            work=capture,
        ),
        Stage(
            name="verify",
            heading="checks every digest and every value of the dataset",
            makes=(layout.verified,),
            work=verify,
        ),
        Stage(
            name="card",
            heading="describes the dataset, and writes one row as a page",
            makes=(layout.page, layout.card),
            work=card,
        ),
        *(
            Stage(
                name=f"train {loss}",
                heading="trains from the shards only, with the teacher's folder moved away",
                makes=(layout.train_summary(loss), layout.teacher_presence(loss)),
                work=train(loss),
            )
            for loss in LOSSES
        ),
    ]


def _write_yaml(path: Path, settings: dict) -> None:
    with new_file(path) as beside:
        beside.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


@contextmanager
def put_away(folder: Path) -> Iterator[None]:
    """Move `folder` to a hidden name while the block runs."""
    os.replace(folder, _away(folder))
    try:
        yield
    finally:
        bring_back(folder)


def bring_back(folder: Path) -> None:
    """Undo `put_away` after a run that was killed inside it."""
    if _away(folder).exists() and not folder.exists():
        os.replace(_away(folder), folder)


def _away(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.put_away")


@contextmanager
def background_module(stage: str, module: str, *arguments: str, layout: Layout, quick: bool) -> Iterator[None]:
    """Run a module as `run_module` does while the block runs, with its output in the log only, and wait for its end.

    Raises `StageFailed` with the last lines of the log.
    """
    log = layout.log(stage)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = module_command(module, *arguments, layout=layout, quick=quick)
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(), preexec_fn=end_with_parent)
    try:
        yield
        code = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    _check(stage, command, code, log=log)


def run_stage(stage: str, command: Sequence[str], *, log: Path) -> None:
    """Run `command` to its end and write both of its streams to `log`.

    Raises `StageFailed` with the last lines of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as log_file:
        child = subprocess.Popen(
            command, stdout=log_file, stderr=subprocess.PIPE, env=_environment(), preexec_fn=end_with_parent
        )
        assert child.stderr is not None
        # A descriptor of its own: once the log is closed, its number may be that of another file.
        own = os.dup(log_file.fileno())
        copier = threading.Thread(target=_copy_stderr, args=(child.stderr, own), daemon=True)
        copier.start()
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        copier.join(timeout=STDERR_WAIT_S)
    _check(stage, command, code, log=log)


def _check(stage: str, command: Sequence[str], code: int, *, log: Path) -> None:
    if code != 0:
        raise StageFailed(
            f"stage {stage}: {shlex.join(command)}",
            found=f"exit code {code}; its last lines:\n{_last_lines(log)}",
            wanted="exit code 0",
            fix=f"read {log}, fix the cause, then run the demo again: it resumes with this stage",
        )


def _copy_stderr(stream: IO[bytes], log: int) -> None:
    """Copy stderr to the descriptor `log`, which is closed at its end, and to the terminal.

    Line ends are not waited for: a progress bar has none.
    """
    with stream, os.fdopen(log, "wb", buffering=0) as kept:
        while chunk := os.read(stream.fileno(), 65536):
            kept.write(chunk)
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()


def _environment() -> dict[str, str]:
    size = shutil.get_terminal_size()
    return {
        # Makes idle OpenMP threads sleep early. When another process uses one of two cores, a training step of the
        # teacher then takes 0.7 s instead of several seconds; on an idle machine it costs a tenth.
        "GOMP_SPINCOUNT": "2000",
        **os.environ,
        # A progress bar behind a pipe cannot read the terminal's width.
        "COLUMNS": str(size.columns),
        "LINES": str(size.lines),
    }


def _last_lines(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:])
