"""What the self-contained HTML pages share: their style, and a policy that allows nothing from outside.

The parts that a page is made of are text of ours; text of a dataset or of a run passes `escaped` first.
"""

from __future__ import annotations

import base64
import hashlib
import html
from importlib import resources

from .visible import visible

MAX_TEXT = 300
"""Maximum number of characters of one text from outside."""


def page_style() -> str:
    """The style of all pages: colors for light and dark, fonts, the header and its figures."""
    return (resources.files("coldstill.common") / "page.css").read_text(encoding="utf-8")


def digest(source: str) -> str:
    """The name of an inline source in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def escaped(value: object, *, most: int = MAX_TEXT) -> str:
    """A value as text of a page or of an attribute: cut after `most` characters, each of them visible."""
    text = str(value)
    return html.escape(visible(text if len(text) <= most else text[: most - 1] + "…"))


def page_without_script(body: str, *, title: str, style: str, reload_s: int | None = None) -> str:
    """A page of `body`, which is HTML of ours, that runs no script and loads nothing.

    `style`: added to `page_style`. `reload_s`: the browser reads the file again after this many seconds; None: never.
    """
    both = page_style() + style
    reload = f'<meta http-equiv="refresh" content="{reload_s}">\n' if reload_s is not None else ""
    policy = f"default-src 'none'; style-src '{digest(both)}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"{reload}<title>{escaped(title)}</title>\n<style>{both}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
