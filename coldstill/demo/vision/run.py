"""`coldstill demo --vision`: the stages of the vision demo, which `coldstill.demo.run` runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console

from coldstill.common.files import new_folder
from coldstill.demo.run import Stage, background_module, dataset_stages, run_module, run_stages
from coldstill.demo.settings import train_config

from .scenes import machine_fonts, write_part
from .settings import DISTILL_SEED, HELD_OUT_SEED, Layout, capture_config, size_of
from .summary import show, write_summary


def run_vision_demo(output: Path, *, quick: bool) -> None:
    """Run the missing stages of the vision demo in `output` and print its summary.

    Raises `OutputOfAnotherSize`, or `StageFailed` with the last lines of the failed stage.
    """
    size = size_of(quick=quick)
    layout = Layout(output.resolve())
    models, measure = (f"coldstill.demo.vision.{name}" for name in ("models", "measure"))

    def images() -> None:
        seen: set[str] = set()
        fonts = machine_fonts()
        with new_folder(layout.text) as folder:
            for part, rows, seed in (
                ("distill", size.distill_rows, DISTILL_SEED),
                ("held_out", size.held_out_rows, HELD_OUT_SEED),
            ):
                write_part(folder, part, seed=seed, rows=rows, fonts=fonts, seen=seen)

    def train_models() -> None:
        # At the same time, each on a thread of its own: a second thread gains models this small little.
        missing = [folder.name for folder in (layout.teacher, layout.student) if not folder.exists()]
        if len(missing) == 2:
            with background_module("student", models, "student", layout=layout, quick=quick):
                run_module("teacher", models, "teacher", layout=layout, quick=quick)
        else:
            run_module(missing[0], models, missing[0], layout=layout, quick=quick)

    stages = [
        Stage(
            name="images",
            heading="draws shapes and digits, and writes questions about them",
            makes=(layout.text,),
            work=images,
        ),
        Stage(
            name="models",
            heading="trains a teacher that sees from scratch, and beside it a smaller student, for fewer steps",
            makes=(layout.teacher, layout.student),
            work=train_models,
        ),
        *dataset_stages(layout, capture_config(layout, size), lambda loss: train_config(layout, size, loss=loss)),
        Stage(
            name="measure",
            heading="reads the models' answers, and the KL to the teacher, on images that no model was trained on",
            makes=(layout.measurements, layout.answers),
            work=lambda: run_module("measure", measure, layout=layout, quick=quick),
        ),
        Stage(
            name="summary",
            heading="writes one table, and one picture with images, questions and answers",
            makes=(layout.summary, layout.picture),
            work=lambda: write_summary(layout, size),
        ),
    ]

    def before_new(console: Console) -> AbstractContextManager[None]:
        console.print(expected(quick=quick), soft_wrap=True)
        return nullcontext()

    run_stages(stages, layout, size, quick=quick, show=show, before_new=before_new)


def expected(*, quick: bool) -> str:
    """What the demo prints at its start. The times are those of its `--help`: nothing is measured on this machine."""
    return (
        f"This takes about {4 if quick else 12} minutes on 2 cores that nothing else uses, and longer beside other "
        "programs. Each stage says when it begins."
    )
