"""Text of strangers made safe to look at: any string in, the same string without an invisible character out.

Token text, sample ids and metadata may hold terminal escapes, bidirectional overrides or lone surrogates. Here each of
them becomes something that can be seen, so that neither a terminal nor a browser ever acts on it.
"""

from __future__ import annotations

import unicodedata

NEWLINE = "⏎"
SPACE = "␣"

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
"""Unicode categories that have no picture of their own: controls, format signs, surrogates, unassigned, separators."""


def visible(text: str, *, newline: str = NEWLINE) -> str:
    """`text` with a picture or an escape in place of each character that has none; `newline` stands for line feeds.

    Controls become their control pictures (U+2400 block), everything else `\\x9b`, `\\u202e` or `\\U000e0001`. The
    plain space stays.
    """
    return newline.join(line.translate(_TABLE) for line in text.split("\n"))


class _Table(dict[int, str]):
    """Filled as characters are met: the whole of Unicode would be a million entries."""

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
