"""What `coldstill compare` does: read the runs, print tables or JSON, write a page or a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coldstill.common.clock import local_now
from coldstill.common.page import MAX_TEXT
from coldstill.common.visible import visible
from coldstill.tools.inspect.page import put_page
from coldstill.trainer.run_report.compare import Comparison, comparison_page, read_runs

from .output import json_text


def compare(
    folders: Sequence[Path],
    *,
    evaluations: Sequence[Path],
    html: Path | None,
    png: Path | None,
    as_json: bool,
    console: Console,
) -> None:
    """Compare the runs in `folders`. With `as_json`, standard output holds one JSON document and nothing else.

    Raises `PageNotWritten`, `PackagesMissing`, and what `read_runs` raises.
    """
    comparison = read_runs(folders, evaluations=evaluations)
    if html is not None:
        put_page(html, comparison_page(comparison, now=local_now()).encode())
    if png is not None:
        from coldstill.trainer.run_report.plot import comparison_png

        put_page(png, comparison_png(comparison))
    if as_json:
        print(json_text(comparison.document()))
    else:
        show_comparison(comparison, console=console)


def show_comparison(comparison: Comparison, *, console: Console) -> None:
    """Print the figures, the settings that differ, and the facts, with one column per run."""
    for title, rows in comparison.tables().items():
        console.print(_table(title.lower(), rows, list(comparison.runs)))
        console.print()


def _table(title: str, rows: Mapping[str, Sequence[str]], names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(_text(name), overflow="fold")
    for name, values in rows.items():
        table.add_row(*map(_text, (name, *values)))
    return table


def _text(value: str) -> Text:
    return Text(visible(value if len(value) <= MAX_TEXT else value[: MAX_TEXT - 1] + "…"))
