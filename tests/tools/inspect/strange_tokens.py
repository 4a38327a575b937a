"""Datasets with strange text: tokens of every kind of tokenizer, and text that is harmful unless it is escaped."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import CachedRow, span_positions, spans_from_mask
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE
from tests import making

SCRIPT = "</script><script>document.title='taken'</script>"
HOSTILE = (
    SCRIPT,
    "<!--<script>",
    "<img src=http://127.0.0.1:9/x onerror=\"document.title='taken'\">",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\u202eright to left",
    "\u2066\u200f",
    "\u2028line",
    "\r\n\t\x00",
    "`${document.title='taken'}`",
    "'\"&amp;",
    "[bold red]markup[/]",
    "",
    "a" * 5000,
    "\u0301accent",
    "⏎ no newline",
)
"""Token texts that do something to a page, a terminal or a reader unless they are shown as text."""


def folder_of(tokenizer: Tokenizer, folder: Path) -> Path:
    """The tokenizer as a folder with a `tokenizer.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    return folder


def plain_tokenizer(tokens: tuple[str, ...], folder: Path) -> Path:
    """Tokens that stand for their own text; id `i` is `tokens[i]`."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return folder_of(Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=tokens[0])), folder)


def byte_tokenizer() -> Tokenizer:
    """Byte-level: one token for each byte, as GPT-2 writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def row_of(token_ids: np.ndarray, *, vocabulary: int, top_k: int, draws: int = 4, context: int = 0) -> CachedRow:
    """A row of these tokens under a random teacher; the first `context` tokens have no target."""
    rng = np.random.default_rng(5)
    learned = np.arange(token_ids.size) >= context
    spans = spans_from_mask(learned)
    positions = span_positions(spans)
    probs = making.random_probs(rng, positions.size, vocabulary)
    labels = token_ids[positions + 1]
    targets = making.targets_of(probs, labels, top_k=top_k, draws=draws, draw_logprobs=True)
    return CachedRow(
        sample_id=f"id {SCRIPT}\x1b[31m\u202e",
        token_ids=token_ids.astype(np.int32),
        target_spans=spans,
        targets=targets,
        metadata={f"key {SCRIPT}\x1b[32m": ["\u202e", SCRIPT]},
    )


def hostile_dataset(root: Path, folder: Path) -> Path:
    """One row that holds each of `HOSTILE` once; id, metadata, teacher and license are hostile too."""
    tokens = (*HOSTILE, *(f"w{i}" for i in range(40)))
    tokenizer = plain_tokenizer(tokens, folder)
    about = {"license": f"{SCRIPT}\x1b[33m", SCRIPT: SCRIPT}
    header = making.tiny_header(tokenizer, top_k=24, about=about, draw_logprobs=True)
    teacher = header.teacher.model_copy(update={"name": f"{SCRIPT}\x1b[34m\u202e"})
    row = row_of(np.arange(len(tokens)), vocabulary=len(tokens), top_k=24)
    making.write_dataset(root, [[row]], header=header.model_copy(update={"teacher": teacher}), tokenizer=tokenizer)
    return root


def long_dataset(folder: Path) -> Path:
    """One row of 4,096 tokens at K = 64, V = 256."""
    tokenizer = folder_of(byte_tokenizer(), folder / "tokenizer")
    tokens = np.frombuffer((("words and more words,\n" * 200).encode())[:4096], np.uint8).astype(np.int32)
    row = row_of(tokens, vocabulary=256, top_k=64, draws=8)
    header = making.tiny_header(tokenizer, top_k=64, draws=8, draw_logprobs=True, max_length=4096)
    making.write_dataset(folder / "dataset", [[row]], header=header, tokenizer=tokenizer)
    return folder / "dataset"


def without_tokenizer(root: Path, rows: list[CachedRow], *, tokenizer: Path) -> Path:
    """A sealed dataset of these rows that holds no tokenizer files."""
    header = making.tiny_header(tokenizer)
    store: Store = making.begin_dataset(root, header, tokenizer, [len(rows)])
    store.delete_folder("tokenizer")
    commit_unit(store, 0, rows=rows, rejects=[], header=header, environment={})
    seal(store)
    return root


def hidden_characters(text: str) -> set[str]:
    """Characters of `text` that are not seen, or that make a terminal or browser do something; line feeds are fine."""
    return {sign for sign in text if sign not in " \n" and unicodedata.category(sign)[0] in "CZ"}
