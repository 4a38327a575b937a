"""Prints results as tables or JSON files, and errors in red on standard error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from coldstill.common.files import write_json


def show_result(result: Mapping[str, Any], *, title: str, summary: Path | None = None) -> None:
    """Print a result as a table, and write it to the file `summary` as JSON."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else _text(value))
    Console().print(table)
    if summary:
        write_json(summary, result)


def show_error(text: str) -> None:
    """Print a message to standard error, in red where colors are shown."""
    Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def show_warning(text: str) -> None:
    """Print a message to standard error, in yellow where colors are shown."""
    Console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
