"""The front door: one command, and the rooms behind it, each loaded only when it is called."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from storage_schema.errors import ColdstillError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Teach a small model with a big one, without keeping the big one in memory.\n\n"
    "A teacher runs once (`capture`) and leaves a dataset of its next-token distributions; from then on students are "
    "trained from that dataset alone (`train`). `demo` shows all of it on this machine, without a network.",
)

Config = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Settings; the keys are listed below.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings that replace the file's.")]


class PackagesMissing(ColdstillError):
    """A command needs packages that are not installed: they are an extra of this distribution."""


def _command_with_keys(module: str, model: str) -> type[TyperCommand]:
    """A command whose `--help` also lists every key of its settings; the settings are imported only then."""

    class CommandWithKeys(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            _print_keys(getattr(importlib.import_module(module), model))

    return CommandWithKeys


@app.command(cls=_command_with_keys("pipeline.config", "CaptureConfig"))
def capture(
    config: Config,
    overrides: Overrides = None,
    summary: Annotated[Path | None, typer.Option(help="Write the summary as JSON to this file too.")] = None,
) -> None:
    """Run a teacher over a source and write a dataset of its distributions.

    Start the same command again after any interruption: it does what is missing, and nothing twice.
    """
    _require("capture", "ray", "torch", "transformers")
    from coldstill_config import load_config
    from pipeline.capture import capture as run_capture
    from pipeline.config import CaptureConfig

    result = run_capture(load_config(config, model=CaptureConfig, overrides=overrides or ()))
    _finish(result.model_dump(), summary, title="capture")


@app.command(cls=_command_with_keys("trainer.config", "TrainConfig"))
def train(
    config: Config,
    overrides: Overrides = None,
    summary: Annotated[Path | None, typer.Option(help="Write the summary as JSON to this file too.")] = None,
) -> None:
    """Train a student from a dataset.

    Start the same command again after any interruption: it goes on from the newest checkpoint.
    """
    _require("train", "accelerate", "torch", "transformers")
    from transformers.utils import logging

    from coldstill_config import load_config
    from trainer.config import TrainConfig
    from trainer.train import train as run_train

    logging.disable_progress_bar()  # those of loading and saving, which would break the bar of the run

    result = run_train(load_config(config, model=TrainConfig, overrides=overrides or ()))
    _finish(result.model_dump(), summary, title="train")


@app.command()
def verify(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="The dataset's directory, or a URL that fsspec reaches.")],
    deep: Annotated[bool, typer.Option("--deep", help="Decode every row and check every value too.")] = False,
) -> None:
    """Check that a dataset holds what its manifest says.

    Where it does not: one line per finding, and exit code 1.
    """
    from storage_schema.dataset import open_dataset
    from storage_schema.tools.verify import verify as run_verify

    findings = run_verify(root, deep=deep)
    for finding in findings:
        typer.echo(f"{finding.error}: " + " | ".join(line.strip() for line in finding.message.splitlines()))
    if findings:
        raise typer.Exit(1)
    dataset = open_dataset(root)
    _finish(
        {
            "dataset_id": dataset.dataset_id,
            "shards": len(dataset.shards),
            "rows": len(dataset),
            "targets": dataset.manifest.targets,
            "checked": "files, digests and every value" if deep else "files and digests",
        },
        None,
        title="verified",
    )


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Where models, dataset and results go; a second run goes on there.")
    ] = Path("demo_output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A fifth of the size: the same order of results, in under four minutes.")
    ] = False,
) -> None:
    """Show the product on this machine: a teacher under vLLM and Ray, its dataset, three students. About 8 minutes."""
    _require(
        "capture-cpu,train,share", "accelerate", "matplotlib", "ray", "tokenizers", "torch", "transformers", "vllm"
    )
    from demo.run import run_demo

    run_demo(output, quick=quick)


def main() -> None:
    """Entry point of the `coldstill` command: an error that the user can mend is printed, with exit code 1."""
    try:
        app()
    except ColdstillError as error:
        message = f"{type(error).__name__}: {error}"
        Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def _require(extras: str, *packages: str) -> None:
    """Raise `PackagesMissing` before any work is begun that would only fail later."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise PackagesMissing(
            "this command's packages",
            found=f"no {', '.join(missing)}",
            wanted=f"the extras {extras}",
            fix=f'pip install "coldstill[{extras}]"',
        )


def _finish(result: dict[str, Any], summary: Path | None, *, title: str) -> None:
    """Print a result, and write it as JSON where asked."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else _text(value))
    Console().print(table)
    if summary:
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _print_keys(model: Any) -> None:
    from coldstill_config import described_keys

    table = Table("key", "default", "meaning", title="Keys of CONFIG.yaml", title_justify="left")
    for key, default, sentence in described_keys(model):
        table.add_row(key, default, sentence)
    Console().print(table)


if __name__ == "__main__":
    main()
