"""The front door: one command, and the rooms behind it, each loaded only when it is called."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from coldstill.cli.dataset_commands import dataset_commands
from coldstill.cli.output import show_result
from coldstill.common.errors import ColdstillError
from coldstill.common.packages import require_packages
from coldstill.common.visible import visible

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Teach a small model with a big one, without keeping the big one in memory.\n\n"
    "A teacher runs once (`capture`) and leaves a dataset of its next-token distributions; from then on students are "
    "trained from that dataset alone (`train`). `demo` shows all of it on this machine, without a network.",
)
MAKE = "Capture and train"

Config = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Settings; the keys are listed below.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings that replace the file's.")]


def _command_with_keys(module: str, model: str) -> type[TyperCommand]:
    """A command whose `--help` also lists every key of its settings; the settings are imported only then."""

    class CommandWithKeys(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            _print_keys(getattr(importlib.import_module(module), model))

    return CommandWithKeys


@app.command(rich_help_panel=MAKE, cls=_command_with_keys("coldstill.pipeline.config", "CaptureConfig"))
def capture(
    config: Config,
    overrides: Overrides = None,
    summary: Annotated[Path | None, typer.Option(help="Write the summary as JSON to this file too.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the source and say what the capture would be; write nothing.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="With --dry-run: have one worker score for a minute, for hours and cost.")
    ] = False,
) -> None:
    """Run a teacher over a source and write a dataset of its distributions.

    Start the same command again after any interruption: it does what is missing, and nothing twice.
    """
    require_packages("capture", "ray", "torch", "transformers")
    from coldstill.common.config_file import load_config
    from coldstill.pipeline.capture import capture as run_capture
    from coldstill.pipeline.config import CaptureConfig

    settings = load_config(config, model=CaptureConfig, overrides=overrides or ())
    if probe and not dry_run:
        raise typer.BadParameter("--probe belongs to --dry-run")
    if dry_run:
        from coldstill.pipeline.dry_run import dry_run as run_dry

        show_result(run_dry(settings, probe=probe).lines(), title="dry run", summary=summary)
        return
    try:
        result = run_capture(settings)
    except KeyboardInterrupt:
        Console(stderr=True).print(
            "interrupted: what was committed stays good; start the same command again to do the rest",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    show_result(result.model_dump(), title="capture", summary=summary)


@app.command(rich_help_panel=MAKE)
def status(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="The capture's output, here or on s3:// or gs://.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document; with --watch, one per line.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until nobody is at work any more.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")] = 10.0,
) -> None:
    """Show how far a capture is, from any machine that reaches its directory: done, failed, speed, time left, cost.

    Works while it runs, after its driver has died, and after its end.
    """
    import time

    from coldstill.cli.status_table import show_status, watch_status
    from coldstill.pipeline.driver.status import read_status

    if watch and not as_json:
        watch_status(lambda: read_status(root), every_s=every, console=Console())
        return
    found = read_status(root)
    while watch and not found.is_over:
        typer.echo(found.model_dump_json())
        time.sleep(every)
        found = read_status(root)
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        show_status(found, console=Console())


@app.command(rich_help_panel=MAKE, cls=_command_with_keys("coldstill.trainer.config", "TrainConfig"))
def train(
    config: Config,
    overrides: Overrides = None,
    summary: Annotated[Path | None, typer.Option(help="Write the summary as JSON to this file too.")] = None,
) -> None:
    """Train a student from a dataset.

    Start the same command again after any interruption: it goes on from the newest checkpoint.
    """
    require_packages("train", "accelerate", "torch", "transformers")
    from transformers.utils import logging

    from coldstill.common.config_file import load_config
    from coldstill.trainer.config import TrainConfig
    from coldstill.trainer.train import train as run_train

    logging.disable_progress_bar()  # those of loading and saving, which would break the bar of the run

    result = run_train(load_config(config, model=TrainConfig, overrides=overrides or ()))
    show_result(result.model_dump(), title="train", summary=summary)


@app.command(rich_help_panel=MAKE)
def evaluate(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Folder or hub name of the model to measure.")],
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="A dataset's directory, or a URL that fsspec reaches.")
    ],
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="Load this teacher too, for KL over the whole vocabulary.")
    ] = None,
    rouge: Annotated[
        int, typer.Option(metavar="ROWS", min=0, help="Answer the prompts of so many rows; ROUGE-L to the references.")
    ] = 0,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="A task of lm-eval by name, or a YAML file of one.")
    ] = None,
    per_token: Annotated[int, typer.Option(metavar="ROWS", min=0, help="Show so many rows token by token.")] = 0,
    records: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what --per-token shows to FILE, as JSON lines.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 8,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type of the models' weights.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="The metrics as one JSON document.")] = False,
) -> None:
    """Measure a student on a dataset: cross-entropy, KL to the teacher, agreement, calibration, head and tail mass."""
    require_packages("train", "accelerate", "torch", "transformers")
    from transformers.utils import logging

    from coldstill.cli.evaluate import evaluate as run_evaluate

    logging.disable_progress_bar()
    run_evaluate(
        student,
        dataset,
        teacher=teacher,
        rouge=rouge,
        tasks=tasks or (),
        per_token=per_token,
        records=records,
        batch_size=batch_size,
        weights=dtype,
        as_json=as_json,
    )


@app.command(rich_help_panel=MAKE)
def demo(
    output: Annotated[
        Path, typer.Option(help="Where models, dataset and results go; a second run goes on there.")
    ] = Path("demo_output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A fifth of the size: the same order of results, in under four minutes.")
    ] = False,
) -> None:
    """Show the product on this machine: a teacher under vLLM and Ray, its dataset, three students. About 10 minutes."""
    require_packages(
        "capture-cpu,train,share", "accelerate", "matplotlib", "ray", "tokenizers", "torch", "transformers", "vllm"
    )
    from coldstill.demo.run import run_demo

    run_demo(output, quick=quick)


app.add_typer(dataset_commands)


def main() -> None:
    """Entry point of the `coldstill` command: an error that the user can mend is printed, with exit code 1."""
    try:
        app()
    except ColdstillError as error:
        # A message may quote what stands in a stranger's dataset: none of it may steer the terminal.
        message = visible(f"{type(error).__name__}: {error}", newline="\n")
        Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def _print_keys(model: Any) -> None:
    from coldstill.common.config_file import described_keys

    table = Table("key", "default", "meaning", title="Keys of CONFIG.yaml", title_justify="left")
    for key, default, sentence in described_keys(model):
        table.add_row(key, default, sentence)
    Console().print(table)
