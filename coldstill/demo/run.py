"""`coldstill demo`: the stages in their order. Each is skipped where what it makes stands under its final name.

So a demo that was killed, whenever, goes on where it was. The stages that need torch, Ray or vLLM are processes of
their own; this one stays small.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from coldstill.common.errors import ColdstillError

from .files import bring_back, new_file, new_folder, put_away, read_json, write_json
from .process import run_stage
from .settings import FULL, LOSSES, QUICK, Layout, Size
from .stage_configs import capture_config, train_config
from .text import write_text


class OutputOfAnotherSize(ColdstillError):
    """The output folder was begun by a demo of another size."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`heading` says what happens, `makes` is there when it is done, `work` does it."""

    name: str
    heading: str
    makes: tuple[Path, ...]
    work: Callable[[], None]

    @property
    def done(self) -> bool:
        """Whether all that it makes is there."""
        return all(path.exists() for path in self.makes)


def run_demo(output: Path, *, quick: bool) -> None:
    """Run what is missing of the demo in `output`, and show its summary.

    Raises `OutputOfAnotherSize`, and `StageFailed` with the last lines of a stage that did not end well.
    """
    size = QUICK if quick else FULL
    layout = Layout(output.resolve())
    console = Console(highlight=False)
    _claim(layout, size, quick=quick)
    bring_back(layout.teacher)
    started = time.monotonic()
    stages = _stages(layout, size, quick=quick)
    for number, stage in enumerate(stages, start=1):
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        state = "  [dim]done before[/dim]" if stage.done else ""
        console.print(
            f"[bold]{number}/{len(stages)}[/bold] [dim]{minutes:2}:{seconds:02}[/dim]  "
            f"[bold]{stage.name}[/bold]  {stage.heading}{state}",
            soft_wrap=True,
        )
        if not stage.done:
            stage.work()
    from .summary import show

    show(layout, console, wall_s=time.monotonic() - started)


def _claim(layout: Layout, size: Size, *, quick: bool) -> None:
    """Make the output folder that of a demo of this size, or refuse it."""
    wanted = size.as_dict()
    if layout.size.exists():
        found = read_json(layout.size)
        if found != wanted:
            differing = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
            raise OutputOfAnotherSize(
                f"{layout.root}: begun with another size",
                found={key: found.get(key) for key in differing},
                wanted={key: wanted.get(key) for key in differing},
                fix=f"choose another --output, {'leave --quick out' if quick else 'add --quick'}, or delete the folder",
            )
    layout.root.mkdir(parents=True, exist_ok=True)
    write_json(layout.size, wanted)


def _stages(layout: Layout, size: Size, *, quick: bool) -> list[Stage]:
    coldstill = [sys.executable, "-m", "coldstill"]
    options = ["--quick"] if quick else []

    def module(name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"demo.{name}", *arguments, str(layout.root), *options]

    def run(stage: str, command: list[str]) -> None:
        run_stage(stage, command, log=layout.log(stage))

    def text() -> None:
        with new_folder(layout.text) as folder:
            write_text(folder, distill_rows=size.distill_rows, held_out_rows=size.held_out_rows)

    def capture() -> None:
        _write_yaml(layout.capture_config, capture_config(layout, size))
        with new_file(layout.capture_summary) as beside:
            run("capture", [*coldstill, "capture", str(layout.capture_config), "--summary", str(beside)])

    def verify() -> None:
        run("verify", [*coldstill, "verify", "--deep", str(layout.dataset)])
        with new_file(layout.verified) as beside:
            beside.write_bytes(layout.log("verify").read_bytes())

    def card() -> None:
        with new_file(layout.page) as beside:
            run("page", [*coldstill, "inspect", str(layout.dataset), "0", "--html", str(beside)])
        run("card", [*coldstill, "card", "--replace", str(layout.dataset)])

    def train(loss: str) -> Callable[[], None]:
        def work() -> None:
            _write_yaml(layout.train_config(loss), train_config(layout, size, loss=loss))
            with put_away(layout.teacher):
                before = layout.teacher.exists()
                run(f"train_{loss}", [*coldstill, "train", str(layout.train_config(loss))])
                write_json(layout.witness(loss), {"teacher_before": before, "teacher_after": layout.teacher.exists()})

        return work

    def summary() -> None:
        from .summary import write_summary

        write_summary(layout, size)

    return [
        Stage(
            name="text",
            heading="this machine's Python library, raw and as instruction pairs",
            makes=(layout.text,),
            work=text,
        ),
        Stage(
            name="teacher",
            heading="a tokenizer and a teacher, trained from nothing",
            makes=(layout.tokenizer, layout.teacher),
            work=lambda: run("teacher", module("models", "teacher")),
        ),
        Stage(
            name="student",
            heading="a smaller student, pre-trained on the teacher's text",
            makes=(layout.student,),
            work=lambda: run("student", module("models", "student")),
        ),
        Stage(
            name="capture",
            heading="Ray, vLLM, top-k log-probs into Parquet shards",
            makes=(layout.dataset / "manifest.json", layout.capture_summary),
            work=capture,
        ),
        Stage(
            name="verify",
            heading="every digest, every value",
            makes=(layout.verified,),
            work=verify,
        ),
        Stage(
            name="card",
            heading="what the dataset holds, what storage cost, one row as a page",
            makes=(layout.page, layout.card),
            work=card,
        ),
        *(
            Stage(
                name=f"train {loss}",
                heading="from the shards alone, the teacher put away",
                makes=(layout.train_summary(loss), layout.witness(loss)),
                work=train(loss),
            )
            for loss in LOSSES
        ),
        Stage(
            name="measure",
            heading="true KL to the teacher, on files that no model has seen",
            makes=(layout.measurements,),
            work=lambda: run("measure", module("measure")),
        ),
        Stage(
            name="summary",
            heading="one table, one picture",
            makes=(layout.summary, layout.picture),
            work=summary,
        ),
    ]


def _write_yaml(path: Path, settings: dict) -> None:
    with new_file(path) as beside:
        beside.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
