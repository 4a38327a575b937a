"""Fingerprint of a tokenizer: a digest of the meaning of its ids.

A student can train from a dataset only if its tokenizer has the fingerprint of the teacher's. The digest covers the
token of each id, which ids are special, and the merges; not file layout, chat template and padding settings.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TokenizerNotFound

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""The files of a teacher's tokenizer that a dataset keeps, if they exist."""
TOKENIZER_FOLDER = "tokenizer"
MAX_TOKENIZER_BYTES = 64 << 20
_MAX_VALUES = 6_000_000
"""Enough for the largest vocabulary that the format allows, with as many merges."""


@dataclass(frozen=True)
class TokenizerFacts:
    """`fingerprint`: sha256 in hex. `token_count`: the highest id that the tokenizer can produce, plus one."""

    fingerprint: str
    token_count: int


def fingerprint(folder: str | Path) -> TokenizerFacts:
    """Facts of the `tokenizer.json` in a local `folder`. Raises `TokenizerNotFound`."""
    path = Path(folder) / TOKENIZER_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerNotFound(
            str(path),
            found=error.strerror,
            wanted="a tokenizer.json of the tokenizers library",
            fix="save the tokenizer with transformers' `save_pretrained` of a fast tokenizer",
        ) from None
    return fingerprint_bytes(data, where=str(path))


def fingerprint_bytes(data: bytes, *, where: str) -> TokenizerFacts:
    """Facts of a `tokenizer.json` given as bytes. Raises `TokenizerNotFound` if it is invalid."""
    try:
        if len(data) > MAX_TOKENIZER_BYTES:
            raise ValueError(f"{len(data)} bytes")
        if sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES} values")
        return _facts(json.loads(data))
    except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerNotFound(
            where, found=f"{type(error).__name__}: {error}"[:300], wanted="a valid tokenizer.json"
        ) from None


def _facts(document: dict[str, Any]) -> TokenizerFacts:
    model = document["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        tokens = {int(token_id): str(token) for token, token_id in vocabulary.items()}
    else:  # a Unigram model: a list of [token, score]
        tokens = {token_id: str(entry[0]) for token_id, entry in enumerate(vocabulary)}
    special = set()
    for added in document.get("added_tokens") or ():
        tokens[int(added["id"])] = str(added["content"])
        if added.get("special"):
            special.add(int(added["id"]))
    # Merges are written "a b" by old releases of the tokenizers library and ["a", "b"] by new ones.
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model.get("merges") or ()]
    canonical = [[token_id, tokens[token_id], token_id in special] for token_id in sorted(tokens)]
    text = json.dumps({"merges": merges, "tokens": canonical}, ensure_ascii=True, separators=(",", ":"))
    return TokenizerFacts(hashlib.sha256(text.encode()).hexdigest(), max(tokens) + 1)
