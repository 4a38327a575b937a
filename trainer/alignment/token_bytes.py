"""The bytes of text that each token id stands for.

Offsets of characters do not serve: a token may hold a part of a multi-byte character. Byte-level BPE (GPT-2, Llama 3,
Qwen) writes each byte as one character of a fixed table. Sentencepiece models (Llama 2, Mistral, Gemma) write a space
as U+2581 and a byte without a token as `<0xNN>`. Other tokenizers, such as WordPiece, lose spaces or case: an error.

Shape letters: `T` tokens of a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from coldstill.trainer.errors import TokenizerNotAligned

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ByteText(NamedTuple):
    """`ids int64 [T]` and the text that they write. `ends int64 [T]`: the byte of `text` at which each ends.

    A special token writes its own name, such as `<s>`."""

    ids: np.ndarray
    text: bytes
    ends: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """`int64 [T]`: the byte at which each token begins."""
        return np.concatenate(([0], self.ends[:-1])) if self.ends.size else self.ends


class TokenBytes:
    """A tokenizer, and the bytes of each of its ids. Threads may share it, and it can be pickled.

    `special bool [V]`: ids of special tokens, which stand for no text. `of_id`: bytes by id, empty for an unused id.
    `fallback bool [V]`: ids such as `<0x41>`, of which a tokenizer writes text only where no other token fits.
    """

    def __init__(self, tokenizer_json: bytes, *, where: str):
        """Raises `TokenizerNotAligned` for a tokenizer whose tokens do not stand for bytes."""
        self.where = where
        self._tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        document = json.loads(tokenizer_json)
        style = _style(document, where=where)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        count = max(vocabulary.values()) + 1
        self.of_id: list[bytes] = [b""] * count
        self.special, self.fallback = np.zeros(count, bool), np.zeros(count, bool)
        for token, id_ in vocabulary.items():
            byte = _BYTE.fullmatch(token) if style == "metaspace" else None
            self.fallback[id_] = byte is not None
            self.of_id[id_] = bytes([int(byte[1], 16)]) if byte else _bytes_of(token, style)
        for added in document.get("added_tokens") or ():
            # They are matched in the text as they are. Gemma's runs of spaces are written as the model writes them.
            content = str(added["content"])
            self.of_id[added["id"]] = content.encode() if style == "bytes" else content.replace(_SPACE, " ").encode()
            self.special[added["id"]] = bool(added.get("special"))
        self._prepends, self._prepends_after = self._added_spaces()

    @property
    def count(self) -> int:
        """V: the highest id plus one."""
        return len(self.of_id)

    def encode(self, text: str) -> ByteText:
        """The tokens of `text`; none are added before or after it."""
        return self.read(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def read(self, ids: Sequence[int] | np.ndarray) -> ByteText:
        """The text of `ids`, without the space that the tokenizer itself puts before a text."""
        listed = list(map(int, ids))
        parts = [self.of_id[id_] for id_ in listed]
        for place in self._first_of_runs(listed):
            if parts[place].startswith(b" "):
                parts[place] = parts[place][1:]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return ByteText(np.array(listed, np.int64), b"".join(parts), ends)

    def specials_in(self, text: ByteText, start: int, stop: int) -> list[tuple[int, int, int]]:
        """First and last byte, counted from `start`, and id of the special tokens in the bytes `start` to `stop`."""
        places = np.flatnonzero(self.special[text.ids] & (text.starts >= start) & (text.ends <= stop))
        starts, ends = text.starts[places] - start, text.ends[places] - start
        return list(zip(starts.tolist(), ends.tolist(), text.ids[places].tolist(), strict=True))

    def first_ids(self, texts: Sequence[bytes]) -> np.ndarray:
        """`int64 [len(texts)]`: the first token that writes each of `texts` behind other text; -1 if not known."""
        found = np.full(len(texts), -1, np.int64)
        # Behind a line end, tokenizers that put a space before a whole text put none.
        for before in (b"", b"\n"):
            left = [number for number in np.flatnonzero(found < 0).tolist() if _is_utf8(texts[number])]
            encoded = self._tokenizer.encode_batch(
                [(before + texts[number]).decode() for number in left], add_special_tokens=False
            )
            for number, one in zip(left, encoded, strict=True):
                found[number] = self._id_at(one.ids, before, texts[number])
        return found

    def _id_at(self, ids: list[int], before: bytes, text: bytes) -> int:
        """The first of the tokens that write `text` behind `before`; -1 if `ids` are not such tokens."""
        written = self.read(ids)
        place = np.flatnonzero(written.starts == len(before))
        if written.text != before + text or not place.size or self.special[written.ids].any():
            return -1
        id_ = int(written.ids[place[-1]])
        # A space that the tokenizer adds to a text is no byte of it, but would be one within a text.
        return id_ if text.startswith(self.of_id[id_]) and self.of_id[id_] else -1

    def _first_of_runs(self, ids: list[int]) -> Iterator[int]:
        """Places of tokens before which the tokenizer puts a space of its own."""
        if self._prepends and ids and not self.special[ids[0]]:
            yield 0
        if self._prepends_after:
            for place in range(1, len(ids)):
                if self.special[ids[place - 1]] and not self.special[ids[place]]:
                    yield place

    def _added_spaces(self) -> tuple[bool, bool]:
        """Whether a space is put before a whole text, and before text that follows a special token."""

        def text_of(text: str) -> bytes:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            return b"".join(self.of_id[id_] for id_ in ids if not self.special[id_])

        first = next((self.of_id[id_].decode() for id_ in np.flatnonzero(self.special)), None)
        return text_of("a") == b" a", first is not None and text_of(f"{first}a") == b" a"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tokenizer = Tokenizer.from_str(state["_tokenizer"])


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _style(document: dict[str, Any], *, where: str) -> str:
    """`bytes` or `metaspace`: how the tokens of the model are written."""
    steps = [step for name in ("decoder", "pre_tokenizer", "normalizer") for step in _steps(document.get(name))]
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return "bytes"
    replaces = any(step.get("type") == "Replace" and _SPACE in json.dumps(step, ensure_ascii=False) for step in steps)
    if ("Metaspace" in kinds or replaces) and document["model"].get("type") in ("BPE", "Unigram"):
        return "metaspace"
    raise TokenizerNotAligned(
        f"tokenizer of {where}",
        found=f"a {document['model'].get('type')} model, whose tokens do not keep each byte of the text",
        wanted="byte-level BPE, or a sentencepiece model (BPE or Unigram)",
        fix="choose a student and a teacher with such tokenizers, or a student with the teacher's tokenizer",
    )


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    if isinstance(step, dict):
        yield step
        for name in ("decoders", "pretokenizers", "normalizers"):
            for inner in step.get(name) or ():
                yield from _steps(inner)


def _byte_table() -> dict[str, int]:
    """The byte of each character of byte-level BPE, as in GPT-2's encoder: printable bytes are themselves, the others
    follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_table()


def _bytes_of(token: str, style: str) -> bytes:
    if style == "metaspace":
        return token.replace(_SPACE, " ").encode()
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # of a token that the model cannot write
        return token.encode()
