"""The command `coldstill`: the options of each subcommand, and the function that it calls.

A room is imported when its command runs, so that `--help` and the base installation need none of the heavy libraries.
Defaults are read from the function or the settings class that a command calls.
"""

from __future__ import annotations

import importlib
import inspect
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from coldstill import api
from coldstill.common.config_file import described_keys, load_config
from coldstill.common.errors import ColdstillError
from coldstill.common.interrupts import as_interrupted, raising_interrupts
from coldstill.common.packages import require_packages
from coldstill.common.visible import visible

from .dataset_commands import dataset_commands
from .output import hide_loading_bars, show_error, show_result, stdout_console, word


class _Commands(TyperGroup):
    """The commands. Ctrl-C, SIGTERM and SIGHUP end each of them with a sentence on how to resume."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises `SystemExit` with the exit code of a signal."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:  # a missing argument has no message of its own: its name teaches nobody
            error.message = error.message or getattr(error.param, "help", None) or ""
            raise
        except KeyboardInterrupt as error:
            interrupted = as_interrupted(error, _RESUME.get(ctx.invoked_subcommand or "", ""))
            show_error(f"\n{interrupted}")
            raise SystemExit(interrupted.exit_code) from None


_RESUME = {
    "capture": "Committed units are kept; re-run the same command to resume.",
    "train": "Checkpoints are kept; re-run the same command to resume from the newest one.",
    "rounds": "Finished parts are kept; re-run the same command to resume.",
    "demo": "Finished stages are kept; re-run the same command to resume.",
    **dict.fromkeys(
        ("push", "pull", "import", "merge", "split", "subset"),
        "Files that are complete are kept; re-run the same command to resume.",
    ),
    "export": "Delete the unfinished folder before you re-run the command.",
}
"""What to do after an interruption; the other commands leave nothing behind."""

app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Teach a small model with a big one, without keeping the big one in memory.\n\n"
    "`capture` runs the teacher once and writes a dataset of its next-token distributions. `train` trains students "
    "from that dataset alone. `rounds` repeats both on the student's own answers. `demo` captures and trains on this "
    "machine, without a network.",
)
MAKE = "Capture and train"
_NOTHING_DONE = "It was finished before, and nothing was done again: choose another output to start anew.\n"

Config = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Settings file in YAML; --help lists its keys.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Settings that replace those of the file, such as output=data/other."),
]
Summary = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the summary to this file, as JSON.")]
_EVALUATE = {name: parameter.default for name, parameter in inspect.signature(api.evaluate).parameters.items()}


def _command_with_keys(module: str, model: str) -> type[TyperCommand]:
    """A command whose `--help` also lists the keys of its settings, which are imported only then."""

    class CommandWithKeys(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            table = Table(title="Keys of CONFIG.yaml", title_justify="left")
            table.add_column("key", no_wrap=True)
            table.add_column("default", overflow="fold", max_width=12)
            table.add_column("meaning", overflow="fold")
            for key, default, sentence in described_keys(getattr(importlib.import_module(module), model)):
                table.add_row(key, default, sentence)
            stdout_console().print(table)

    return CommandWithKeys


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from coldstill.common.packages import __version__, library_versions

    typer.echo(f"coldstill {__version__}")
    for name, version in library_versions().items():
        typer.echo(f"{name} {version}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Print the version, with those of the installed libraries, and exit.",
        ),
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=MAKE, cls=_command_with_keys("coldstill.pipeline.config", "CaptureConfig"))
def capture(
    config: Config,
    overrides: Overrides = None,
    summary: Summary = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the source, print what the capture would cost, write nothing.")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="With --dry-run: score for a minute on one worker, to estimate hours and cost."),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Read all files of the dataset, and make units with changed bytes again."),
    ] = False,
) -> None:
    """Run a teacher over a source and write a dataset of its distributions.

    Re-run the same command to resume after an interruption: committed units are kept.

    On a finished dataset it makes only those units again whose files are gone or cut.
    """
    require_packages("capture", "ray", "torch", "transformers")
    from coldstill.pipeline.config import CaptureConfig
    from coldstill.storage_schema.manifest import MANIFEST_NAME
    from coldstill.storage_schema.store import Store

    settings = load_config(config, model=CaptureConfig, overrides=overrides or ())
    if probe and not dry_run:
        raise typer.BadParameter("--probe needs --dry-run")
    if repair and dry_run:
        raise typer.BadParameter("--repair writes, and --dry-run writes nothing")
    if dry_run:
        from coldstill.pipeline.dry_run import dry_run as run_dry

        then = "" if probe else "A sharp teacher needs the least bytes, a flat one the most; --probe measures yours."
        show_result(run_dry(settings, probe=probe).lines(), title="dry run", summary=summary, then=then)
        return
    was_finished = Store(settings.output).exists(MANIFEST_NAME)
    result = api.capture(settings, repair=repair).model_dump(exclude_none=True)
    show_result(
        _captured(result, settings.output),
        title="capture",
        summary=summary,
        places={"dataset": settings.output},
        then=(_NOTHING_DONE if was_finished and "repaired" not in result else "")
        + f"Next: coldstill verify --deep {word(settings.output)}, and `dataset: {settings.output}` in the settings of "
        "coldstill train.",
    )


def _captured(result: dict[str, Any], output: str) -> dict[str, Any]:
    """The summary of a capture with the rejects of each reason in a line of its own, and where they are listed."""
    reasons, layouts = result.pop("reject_reasons"), result.pop("read_as")
    rejected = {f"rejected: {reason}": count for reason, count in reasons.items()}
    if rejected:
        rejected["rejects are listed in"] = f"{output.rstrip('/')}/rejects"
    return {**({"read as": "; ".join(layouts)} if layouts else {}), **result, **rejected}


@app.command(rich_help_panel=MAKE)
def status(
    root: Annotated[
        str,
        typer.Argument(metavar="ROOT", help="Output of a capture (a folder, s3:// or gs://) or of rounds."),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document; with --watch, one per line.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until it ends or its driver dies.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two refreshes of --watch.")] = 10.0,
) -> None:
    """Show the progress of a capture: units done and failed, speed, end, cost; or of rounds, and of their part.

    Reads only the output directory, so it works from any machine, during the capture, after a crash and after the end.
    """
    from coldstill.pipeline.driver.status import read_status
    from coldstill.rounds.status import holds_rounds, read_rounds_status

    from .status_table import AnyStatus, show_status, watch_status

    def read() -> AnyStatus:
        return read_rounds_status(root) if holds_rounds(root) else read_status(root)

    if watch and not as_json:
        watch_status(read, every_s=every, console=stdout_console())
        return
    found = read()
    while watch and not found.is_over:
        typer.echo(found.model_dump_json())
        time.sleep(every)
        found = read()
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        show_status(found, console=stdout_console())


@app.command(rich_help_panel=MAKE, cls=_command_with_keys("coldstill.trainer.config", "TrainConfig"))
def train(config: Config, overrides: Overrides = None, summary: Summary = None) -> None:
    """Train a student from a dataset.

    Re-run the same command to resume from the newest checkpoint after an interruption.
    """
    require_packages("train", "accelerate", "torch", "transformers")
    from coldstill.trainer.checkpoints import SUMMARY_NAME
    from coldstill.trainer.config import TrainConfig
    from coldstill.trainer.sharding import end_process_group

    settings = load_config(config, model=TrainConfig, overrides=overrides or ())
    hide_loading_bars()
    output = Path(settings.output)
    was_finished = (output / SUMMARY_NAME).exists()
    show_result(
        api.train(settings).model_dump(),
        title="train",
        summary=summary,
        places={"student": str(output / "student"), "report": str(output / "report.html")},
        then=(_NOTHING_DONE if was_finished else "")
        + f"Next: coldstill evaluate {word(output / 'student')} DATASET, on a dataset of held-out rows.",
    )
    end_process_group()  # not in `api.train`: a program may train again


@app.command(rich_help_panel=MAKE)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Outputs of trainings, finished or not.")],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Report of `evaluate --json` on the student of one of the runs; repeatable. evaluation*.json in the "
            "folder of a run is read anyway.",
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="PAGE", help="Also write a page with the curves.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the curves into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Put training runs side by side: settings that differ, losses, KL, speed, memory, evaluations."""
    from .compare import compare as run_compare

    run_compare(runs, evaluations=evaluation or (), html=html, png=png, as_json=as_json, console=stdout_console())


@app.command(rich_help_panel=MAKE, cls=_command_with_keys("coldstill.rounds.config", "RoundsConfig"))
def rounds(
    config: Config,
    overrides: Overrides = None,
    summary: Summary = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the prompts, print the parts and what a round costs, write nothing.")
    ] = False,
) -> None:
    """Let the student answer prompts, the teacher score them and the student train on the scores, several times.

    Re-run the same command to resume after an interruption: finished parts are kept.
    """
    require_packages("capture,train", "accelerate", "ray", "torch", "transformers")
    from coldstill.rounds.config import RoundsConfig

    settings = load_config(config, model=RoundsConfig, overrides=overrides or ())
    if dry_run:
        from coldstill.rounds.estimate import estimate_rounds

        show_result(estimate_rounds(settings), title="dry run", summary=summary)
        return
    from coldstill.rounds.run import run_rounds

    show_result(run_rounds(settings).model_dump(), title="rounds", summary=summary)


@app.command(rich_help_panel=MAKE)
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
        Path | None, typer.Option(metavar="FILE", help="Write the rows of --per-token to FILE as JSON lines instead.")
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

    hide_loading_bars()
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


@app.command(rich_help_panel=MAKE)
def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for models, dataset and results; a second run resumes there. By default demo_output, or "
            "demo_vision_output with --vision."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A fifth of the size or less, in under four minutes: the same order of results, but with --vision the "
            "models learn too little to compare them.",
        ),
    ] = False,
    vision: Annotated[
        bool, typer.Option("--vision", help="Teacher and students answer questions about images, in about 12 minutes.")
    ] = False,
) -> None:
    """Run everything on this machine in 10 minutes: a teacher under vLLM and Ray, its dataset, three students."""
    from coldstill.demo.settings import has_vllm_wheel

    # Where vLLM has no wheel, the transformers engine captures; only images need vLLM.
    vllm = ("vllm",) if vision or has_vllm_wheel() else ()
    require_packages(
        "capture-cpu,train,share", "accelerate", "matplotlib", "ray", "tokenizers", "torch", "transformers", *vllm
    )
    if vision:
        from coldstill.demo.vision.run import run_vision_demo

        run_vision_demo(output or Path("demo_vision_output"), quick=quick)
        return
    from coldstill.demo.run import run_demo

    run_demo(output or Path("demo_output"), quick=quick)


app.add_typer(dataset_commands)


def main() -> None:
    """Entry point of the command `coldstill`: prints a `ColdstillError` and exits with code 1; a signal, such as Ctrl-C
    or SIGTERM, ends it with 128 and the signal's number."""
    try:
        with raising_interrupts(exit_at_second=True):
            app(prog_name="coldstill")
    except ColdstillError as error:
        # A message may quote a stranger's dataset, which must not control the terminal.
        show_error(visible(f"{type(error).__name__}: {error}", newline="\n"))
        raise SystemExit(1) from None
