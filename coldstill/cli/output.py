"""Results of a command as a table on the terminal, and as JSON in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show_result(result: Mapping[str, Any], *, title: str, summary: Path | None = None) -> None:
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
    return f"{value:,}" if isinstance(value, int) else str(value)
