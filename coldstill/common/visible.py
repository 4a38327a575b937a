"""Makes every character of untrusted text visible, for terminals, web pages and cards.

Token text, sample ids and metadata may contain terminal escapes, bidirectional overrides or lone surrogates. Each of
them is replaced with visible characters, so that neither a terminal nor a browser interprets it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

MAX_SHOWN = 200
"""Maximum number of characters that a card shows of one string."""

NEWLINE = "⏎"
SPACE = "␣"

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
"""Unicode categories without a glyph: controls, format characters, surrogates, private, unassigned, separators."""

# A full stop is only harmful in a bare "www.x.y", which becomes a link; model names contain many others.
_ACTIVE = re.compile(r"[^\w\s.,;/%-]|_|(?<=www)\.", re.IGNORECASE)


def visible(text: str, *, newline: str = NEWLINE) -> str:
    """`text` with each invisible character replaced, and each line feed replaced with `newline`.

    Controls become their control pictures (U+2400 block), all others an escape such as `\\x9b`, `\\u202e` or
    `\\U000e0001`. The plain space stays.
    """
    return newline.join(line.translate(_TABLE) for line in text.split("\n"))


def plain(text: str) -> str:
    """`text` on one line of Markdown without active markup, at most `MAX_SHOWN` characters of it; `-` if it is empty.

    Each character that Markdown, HTML or a link finder could act on becomes a numeric entity. Unlike a backslash, an
    entity also works in table cells, headings and raw HTML.
    """
    shown = shortened(visible(text[: MAX_SHOWN + 1]))
    return _ACTIVE.sub(lambda match: f"&#{ord(match[0])};", shown) or "-"


def counted(count: int, noun: str) -> str:
    """`1 shard`, `2 shards`, `1,000 shards`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shortened(text: str) -> str:
    """At most `MAX_SHOWN` characters, without spaces around them."""
    return (text[:MAX_SHOWN] + "…" if len(text) > MAX_SHOWN else text).strip()


def json_start(value: Any, most: int, *, indent: int | None = None) -> str:
    """The first `most` characters of `value` as visible JSON; line breaks stay.

    Ends as soon as it has them: one megabyte that is nested deeply becomes a gigabyte with indents.
    """
    text = ""
    try:
        for part in json.JSONEncoder(ensure_ascii=False, indent=indent).iterencode(value):
            text += part
            if len(text) > most:
                break
    except RecursionError:  # the encoder of indented JSON calls itself for each level
        text = json.dumps(value, ensure_ascii=False)
    shown = visible(text[:most], newline="\n")
    return shown[:most] + ("…" if len(text) > most or len(shown) > most else "")


class _Table(dict[int, str]):
    """A translation table filled on demand: all of Unicode would be a million entries."""

    def __missing__(self, code: int) -> str:
        self[code] = shown = _show(code)
        return shown


def _show(code: int) -> str:
    character = chr(code)
    if character == " " or unicodedata.category(character) not in _HIDDEN:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_TABLE = _Table()
