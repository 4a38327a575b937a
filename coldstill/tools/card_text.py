"""The text of a dataset card that is copied: whether someone edited it, and how `datasets` finds the shards by it."""

from __future__ import annotations

import hashlib
import re

from .errors import CardExists

CARD_NAME = "README.md"
PLOT_NAME = "card/stats.png"
PREVIEW_NAME = "card/preview.parquet"
CARD_FILES = (CARD_NAME, PLOT_NAME, PREVIEW_NAME)
"""The dataset card, its plot and its preview. The manifest does not list them: the dataset's id stays the same if
someone edits the card."""

MAX_CARD_BYTES = 16 << 20
PREVIEW_CONFIG, ROWS_CONFIG = "preview", "rows"
"""What the viewer shows first and `load_dataset(PATH)` loads, and the shards: `load_dataset(PATH, "rows")`."""

_MARK = "[//]: # (Written by coldstill. sha256 of the text above: "
"""The last line of a generated card: a comment in Markdown."""

_SHORT = """
# Log-probs for distillation

Read them with `from coldstill import open_dataset`. `coldstill card` writes a card that describes them.
"""
_FRONT_MATTER = re.compile(r"\A---[ \t\r]*\n(.*?\n)---[ \t\r]*\n", re.DOTALL)


def marked_card(text: str) -> bytes:
    """A generated card with its digest in the last line, by which `is_unedited` sees whether someone edited it."""
    body = text.rstrip("\n") + "\n\n"
    return f"{body}{_MARK}{hashlib.sha256(body.encode()).hexdigest()})\n".encode()


def is_unedited(card: bytes) -> bool:
    """Whether a card is as `coldstill card` or a push wrote it. A card of an earlier release counts as edited."""
    body, mark, rest = card.rpartition(_MARK.encode())
    return bool(mark) and rest == f"{hashlib.sha256(body).hexdigest()})\n".encode()


def short_card(front: str) -> bytes:
    """The card that a dataset without one gets on the Hub: `front` is the metadata, which names the shards."""
    return marked_card(front + _SHORT)


def with_shards(card: bytes, front: str) -> bytes:
    """A card that someone wrote, with the metadata by which `datasets` finds the shards: those of `front` if it has no
    metadata, or only `configs` if it has none. Its text stays."""
    text = card.decode(errors="replace")
    head, own = _FRONT_MATTER.match(text), _FRONT_MATTER.match(front)
    if head is None or own is None:
        return (front + "\n" + text).encode()
    if re.search(r"^configs\s*:", head[1], re.MULTILINE):
        return card
    configs = re.split(r"^(?=configs:)", own[1], flags=re.MULTILINE)[1]  # the teacher's name may hold the word too
    return f"---\n{head[1].rstrip()}\n{configs}---\n{text[head.end() :]}".encode()


def card_taken(where: str) -> CardExists:
    """The error for a card at the destination that someone edited."""
    return CardExists(
        f"{where}/{CARD_NAME}",
        found="another card than the dataset's, which someone may have edited",
        wanted="no card, an equal one, or one as `coldstill card` writes it",
        fix="copy the text to keep into the dataset's own card; then pass --replace to overwrite the other one",
    )
