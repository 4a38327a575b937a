"""The commands `train`, `compare` and `evaluate`: what each takes, and the function that it calls."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Literal

import typer

from coldstill import api
from coldstill.common.config_file import load_config
from coldstill.common.packages import require_packages

from .output import show_result, stdout_console, word, writable
from .settings_file import MAKE, NOTHING_DONE, Config, Overrides, Summary, command_with_keys

training_commands = typer.Typer()

_EVALUATE = {name: parameter.default for name, parameter in inspect.signature(api.evaluate).parameters.items()}


@training_commands.command(rich_help_panel=MAKE, cls=command_with_keys("coldstill.trainer.config", "TrainConfig"))
def train(config: Config, overrides: Overrides = None, summary: Summary = None) -> None:
    """Train a student from a dataset.

    Re-run the same command to resume from the newest checkpoint after an interruption.
    """
    require_packages("train", "accelerate", "torch", "transformers")
    from coldstill.trainer.checkpoints import SUMMARY_NAME
    from coldstill.trainer.config import TrainConfig
    from coldstill.trainer.run_report.record import PAGE_NAME
    from coldstill.trainer.sharding import end_process_group

    settings = load_config(config, model=TrainConfig, overrides=overrides or ())
    _hide_loading_bars()
    output = Path(settings.output)
    was_finished = (output / SUMMARY_NAME).exists()
    show_result(
        api.train(settings).model_dump(),
        title="train",
        summary=summary,
        places={"student": str(output / "student"), "report": str(output / PAGE_NAME)},
        then=(NOTHING_DONE if was_finished else "")
        + f"Next: coldstill evaluate {word(output / 'student')} DATASET, on a dataset of held-out rows.",
    )
    end_process_group()  # not in `api.train`: a program may train again


@training_commands.command(rich_help_panel=MAKE)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Outputs of trainings, finished or not.")],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Report of `evaluate --json` on the student of one of the runs; repeatable. evaluation*.json in the "
            "folder of a run is read anyway.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE", callback=writable, help="Also write a page with the curves.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=writable, help="Also draw the curves into this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Put training runs side by side: settings that differ, losses, KL, speed, memory, evaluations."""
    from .compare import compare as run_compare

    run_compare(runs, evaluations=evaluation or (), html=html, png=png, as_json=as_json, console=stdout_console())


@training_commands.command(rich_help_panel=MAKE)
def evaluate(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Folder or hub name of the model to measure.")],
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="The dataset's directory, or a URL that fsspec opens.")
    ],
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also load this teacher, for KL over the whole vocabulary.")
    ] = _EVALUATE["teacher"],
    rouge: Annotated[
        int, typer.Option(metavar="ROWS", min=0, help="Answer the prompts of this many rows; report ROUGE-L.")
    ] = 0,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="An lm-eval task, by name or as a YAML file.")
    ] = None,
    per_token: Annotated[int, typer.Option(metavar="ROWS", min=0, help="Print this many rows token by token.")] = 0,
    records: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=writable, help="Write the rows of --per-token to FILE as JSON lines instead."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = _EVALUATE["batch_size"],
    rows: Annotated[
        Literal["all", "without_images"], typer.Option(help="without_images passes over rows that have images.")
    ] = _EVALUATE["rows"],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Data type of the weights.")] = _EVALUATE[
        "dtype"
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON document.")] = False,
) -> None:
    """Measure a student on a dataset: cross-entropy, KL to the teacher, agreement, calibration, head and tail mass."""
    require_packages("train", "accelerate", "torch", "transformers")
    from .evaluate import evaluate as run_evaluate

    _hide_loading_bars()
    run_evaluate(
        student,
        dataset,
        teacher=teacher,
        rouge=rouge,
        tasks=tasks or (),
        per_token=per_token,
        records=records,
        batch_size=batch_size,
        dataset_rows=rows,
        dtype=dtype,
        as_json=as_json,
    )


def _hide_loading_bars() -> None:
    """Turn off transformers' bars for loading and saving, which would break the bar of the run."""
    from transformers.utils import logging

    logging.disable_progress_bar()
