"""`coldstill inspect --html`: one row as one HTML page that needs nothing but itself.

In: a dataset and a row number. Out: a file with style, script and data inside. Its Content-Security-Policy lets nothing
be fetched and nothing run but that script; the dataset's text is data for it and becomes text nodes only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from coldstill.common.errors import ColdstillError
from coldstill.common.visible import visible
from coldstill.tools.inspect.one_row import open_row
from coldstill.tools.inspect.page_data import page_data


class PageNotWritten(ColdstillError):
    """The page's file cannot be written."""


def write_page(root: str | Path, index: int, path: str | Path) -> Path:
    """Write the page of row `index` of the dataset at `root` to `path`; the path.

    Raises `PageNotWritten`, and what `open_row` raises.
    """
    one = open_row(root, index)
    title = f"Row {index} · {visible(one.row.sample_id)}"
    page = render(page_data(one), title=title, plain_text=one.text.row(one.row.token_ids.tolist()))
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise PageNotWritten(
            visible(str(path)), found=error.strerror, wanted="a file that can be written", fix="choose another path"
        ) from None
    return path


def render(data: dict[str, Any], *, title: str, plain_text: str) -> str:
    """The page as text. `plain_text` is what a browser without scripts shows."""
    style, script = _part("page.css"), _part("page.js")
    return Template(_part("page.html")).substitute(
        policy=(
            f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        style=style,
        script=script,
        data=script_safe(data),
        title=html.escape(title),
        plain_text=html.escape(plain_text),
    )


def script_safe(data: Any) -> str:
    """JSON that no HTML parser can leave: ASCII only, and no `<`, `>` or `&` in it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return (resources.files("coldstill.tools.inspect") / name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    """What a Content-Security-Policy calls an inline source."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
