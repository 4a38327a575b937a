"""What the commands that read a settings file share: their arguments, their `--help`, and one sentence."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand

from coldstill.common.config_file import described_keys

from .output import stdout_console, writable

MAKE = "Capture and train"
"""The panel of `coldstill --help` that lists these commands."""

Config = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Settings file in YAML; --help lists its keys.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Settings that replace those of the file, such as output=data/other."),
]
Summary = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=writable(".json"), help="Also write the summary to this file, as JSON."),
]

NOTHING_DONE = "It was finished before, and nothing was done again: choose another output to start anew.\n"
"""Printed after a run that had nothing left to do."""


def command_with_keys(module: str, model: str) -> type[TyperCommand]:
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
