"""Text of strangers as Markdown that means nothing: any string in, a string out that every renderer shows as it is.

Each character that Markdown, HTML or a link finder could act on becomes a numeric entity: unlike a backslash, that
holds in table cells, headings and raw HTML alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from coldstill.common.visible import visible

MAX_SHOWN = 200
"""Characters of one string that are shown."""

# A full stop is only harmful where it makes a bare "www.x.y" a link; model names are full of others.
_ACTIVE = re.compile(r"[^\w\s.,;/%-]|_|(?<=www)\.", re.IGNORECASE)


def plain(text: str) -> str:
    """`text` on one line, at most `MAX_SHOWN` characters of it, with nothing that is markup; `-` where it is empty."""
    shown = cut(visible(text[: MAX_SHOWN + 1]))
    return _ACTIVE.sub(lambda match: f"&#{ord(match[0])};", shown) or "-"


def cut(text: str) -> str:
    """At most `MAX_SHOWN` characters, without spaces around them."""
    return (text[:MAX_SHOWN] + "…" if len(text) > MAX_SHOWN else text).strip()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right where there are more than two. Cells are Markdown:
    text of strangers goes through `plain` first."""
    others = "---" if len(head) == 2 else "--:"
    lines = [head, ["---", *[others] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
