"""Prints results as tables or JSON files, and errors in red on standard error."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coldstill.common.charts import figure
from coldstill.common.visible import visible

_FILE_WIDTH = 160
"""Columns in a file or pipe, where no window ends: an id of 64 characters is not folded, so that it can be searched."""


def stdout_console() -> Console:
    """The console of standard output, as wide as the terminal, `COLUMNS`, or `_FILE_WIDTH` in a file."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_FILE_WIDTH)


def show_result(
    result: Mapping[str, Any],
    *,
    title: str,
    summary: Path | None = None,
    places: Mapping[str, str] | None = None,
    then: str = "",
) -> None:
    """Print a result as a table, and write it to the file `summary` as JSON.

    `places`: further rows of the table, such as where files lie. `then`: what to do next, below the table.
    """
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in {**result, **(places or {})}.items():
        if value is not None:
            table.add_row(name.replace("_", " "), Text(visible(_text(value))))
    stdout_console().print(table)
    if then:
        stdout_console().print(then, markup=False, highlight=False, soft_wrap=True)
    if summary:
        from coldstill.tools.inspect.page import put_page

        put_page(summary, f"{json_text(result, indent=2)}\n".encode())


def json_text(document: Mapping[str, Any], *, indent: int | None = None) -> str:
    """A document as JSON, which has neither NaN nor infinities: they become null."""
    return json.dumps(json.loads(json.dumps(document), parse_constant=lambda _: None), indent=indent)


def writable(*endings: str) -> Callable[[Path | None], Path | None]:
    """A check of an option's file before a command begins its work: that it can be written, and that its name, if it
    has an ending, has one of `endings`, which fit the content.

    It raises `PageNotWritten`.
    """

    def check(path: Path | None) -> Path | None:
        if path is not None:
            _require_writable(path, endings)
        return path

    return check


def _require_writable(path: Path, endings: Sequence[str]) -> None:
    from coldstill.tools.errors import PageNotWritten

    found = ""
    try:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir():
            found = "a folder"
        elif not folder.is_dir():
            found = f"{folder} is a file"
        elif not os.access(path if path.exists() else folder, os.W_OK):
            found = "no permission to write it"
    except OSError as error:  # such as a name that is too long
        found = error.strerror or str(error)
    if found:
        raise PageNotWritten(
            visible(str(path)), found=visible(found), wanted="a file that can be written", fix="choose another path"
        )
    found_endings = [suffix.lower() for suffix in path.suffixes]
    if found_endings and not {*endings} & {*found_endings}:
        raise PageNotWritten(
            visible(str(path)),
            found=f"the ending {visible(found_endings[-1])}",
            wanted=f"{' or '.join(endings)}, as the content is",
            fix=f"write {visible(str(path.with_suffix(endings[0])))}",
        )


def show_error(text: str) -> None:
    """Print a message to standard error, in red where colors are shown."""
    Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def show_warning(text: str) -> None:
    """Print a message to standard error, in yellow where colors are shown."""
    Console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def word(path: object) -> str:
    """A path as one word of a command."""
    return shlex.quote(str(path))


def _text(value: object) -> str:
    if isinstance(value, float):
        return figure(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')}: {_text(of_name)}" for name, of_name in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
