"""The text of single tokens of a dataset, safe to show on terminals and pages.

The `tokenizers` library reads the dataset's `tokenizer/tokenizer.json`; it runs no code from the file. Its decoder does
not run on rows. Decoding a few tokens with known text shows once how the vocabulary encodes bytes, and each token is
then decoded to its own bytes. A token with a part of a multi-byte character therefore shows these bytes instead of a
replacement character.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from coldstill.common.packages import require_packages
from coldstill.common.visible import NEWLINE, SPACE, visible
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.tokenizer import MAX_TOKENIZER_BYTES, TOKENIZER_FILE, TOKENIZER_FOLDER, too_large
from coldstill.tools.errors import TokenizerUnreadable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_SHOWN = 200
"""Maximum number of characters shown of one token. Tokens of real vocabularies are far shorter."""

MAX_TOKENS = 20_000
"""Maximum number of tokens of a row that a page and a terminal show. They omit the rest, with a notice."""

MAX_CHARS = 500_000
"""Characters of all tokens of a row, before each further one is cut to `_SHORT`. Five times the text of `MAX_TOKENS`
real tokens. The limits of one token and of a row together would allow far more."""

MAX_WORD_CHARS = 4_000_000
"""The same for the words of a page: the distinct tokens of a whole vocabulary of 2^18 have fewer."""

_SHORT = 8

INCOMPLETE = "⋯"
"""In running text: the first bytes of a character that a later token completes."""

NO_TEXT = "∅"
"""A token without text."""

_MAX_BYTES = 4 * MAX_SHOWN + 1
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """The text of a dataset's tokens, by id. Without a dataset, or a tokenizer in it, a token is its id: `#17`."""

    def __init__(self, dataset: Dataset | None):
        """Raises `PackagesMissing`, `TokenizerUnreadable`, `FileMissing`, `FileDamaged`."""
        self._tokenizer, self._encoding = _load(dataset) if dataset else (None, _ByteEncoding(None))
        added = {} if self._tokenizer is None else self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content[:_MAX_BYTES] for token_id, token in added.items()}
        self._raws: dict[int, bytes | None] = {}
        self._labels: dict[int, str] = {}

    def raw(self, token_id: int) -> bytes | None:
        """The bytes that the token adds to a text, of a long token the first `_MAX_BYTES`; None for an id without a
        token."""
        if token_id not in self._raws:  # cached: a row can repeat a token of many megabytes on every position
            self._raws[token_id] = self._read(token_id)
        return self._raws[token_id]

    def _read(self, token_id: int) -> bytes | None:
        if self._tokenizer is None:
            return None
        if token_id in self._added:
            return self._added[token_id].encode()[:_MAX_BYTES]
        token = self._tokenizer.id_to_token(token_id)
        return None if token is None else self._encoding.bytes_of(token[:_MAX_BYTES])[:_MAX_BYTES]

    def label(self, token_id: int) -> str:
        """The token by itself, on one line; spaces and newlines are visible too."""
        if token_id not in self._labels:
            self._labels[token_id] = _label(self.raw(token_id), token_id)
        return self._labels[token_id]

    def labels(self, token_ids: Iterable[int]) -> list[str]:
        """The labels of different tokens, cut after `MAX_WORD_CHARS` characters together."""
        return list(_within(map(self.label, token_ids), MAX_WORD_CHARS))

    def pieces(self, token_ids: Iterable[int]) -> list[str]:
        """Each token as its part of the running text: a space is a space, a newline is its sign and a line break.

        A character that several tokens share is shown at the last of them, and `INCOMPLETE` at the others. The pieces
        are cut after `MAX_CHARS` characters together.
        """
        return list(_within(self._pieces(token_ids), MAX_CHARS))

    def _pieces(self, token_ids: Iterable[int]) -> Iterator[str]:
        decoder = _decoder()
        for token_id in token_ids:
            raw = self.raw(token_id)
            if raw is None:
                text, open_bytes = decoder.decode(b"", final=True) + f"#{token_id} ", b""
            else:
                text, open_bytes = decoder.decode(raw[:_MAX_BYTES]), decoder.getstate()[0]
            shown = shortened(visible(text[: MAX_SHOWN + 1], newline=f"{NEWLINE}\n"), MAX_SHOWN)
            yield shown + (INCOMPLETE if open_bytes else "") or NO_TEXT

    def row(self, token_ids: Iterable[int], *, instead: Mapping[int, str] = MappingProxyType({})) -> str:
        """The tokens as one text with its line breaks, cut after about `MAX_CHARS` characters. `instead`: other text of
        the tokens at some places."""
        text = bytearray()
        for place, token_id in enumerate(token_ids):
            if place in instead:
                text += instead[place].encode()
            else:
                raw = self.raw(token_id)
                text += f"#{token_id} ".encode() if raw is None else raw
            if len(text) > MAX_CHARS:
                break
        return shortened(visible(text.decode(errors="backslashreplace"), newline="\n"), MAX_CHARS)


def shortened(text: str, most: int) -> str:
    """At most `most` characters of a text, and a sign if there are more."""
    return text if len(text) <= most else text[:most] + "…"


def _within(texts: Iterable[str], most: int) -> Iterator[str]:
    """The texts; once they have `most` characters together, `_SHORT` characters of each."""
    shown = 0
    for text in texts:
        text = text if shown < most else shortened(text, _SHORT)
        shown += len(text)
        yield text


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")


def _label(raw: bytes | None, token_id: int) -> str:
    if raw is None:
        return f"#{token_id}"
    text = raw[:_MAX_BYTES].decode(errors="backslashreplace")
    if not text:
        return NO_TEXT
    # A combining mark has no letter before it here: it is put on the dotted circle, the placeholder for any letter.
    base = "◌" if unicodedata.category(text[0]).startswith("M") else ""
    return base + shortened(visible(text[: MAX_SHOWN + 1]).replace(" ", SPACE), MAX_SHOWN)


class _ByteEncoding:
    """How a vocabulary encodes bytes as tokens, found by decoding tokens with known text."""

    def __init__(self, tokenizer: Tokenizer | None):
        decoder = None if tokenizer is None else tokenizer.decoder

        def decodes(tokens: list[str], text: str) -> bool:
            return decoder is not None and decoder.decode(tokens) == text

        self._alphabet = _byte_alphabet() if decodes(["x", "Ġa"], "x a") else {}
        self._byte_tokens = decodes(["x", "<0x41>"], "xA")
        self._space_mark = decodes(["x", "▁a"], "x a")
        self._word_end = decodes(["x</w>", "y"], "x y")
        self._continues = decodes(["x", "##y"], "xy")

    def bytes_of(self, token: str) -> bytes:
        if self._alphabet and all(sign in self._alphabet for sign in token):
            return bytes(self._alphabet[sign] for sign in token)
        if self._byte_tokens and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if self._space_mark:
            token = token.replace("▁", " ")
        if self._word_end and token.endswith("</w>"):
            token = token.removesuffix("</w>") + " "
        if self._continues:
            token = token.removeprefix("##") if token.startswith("##") else f" {token}"
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character in byte-level vocabularies (GPT-2's `bytes_to_unicode`).

    Printable characters represent themselves; the other bytes are numbered from U+0100 on.
    """
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(themselves)]
    return {chr(byte): byte for byte in themselves} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _load(dataset: Dataset) -> tuple[Tokenizer | None, _ByteEncoding]:
    name = f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}"
    record = next((file for file in dataset.manifest.files if file.name == name), None)
    if record is None:
        return None, _ByteEncoding(None)
    where = f"{dataset.store.url}/{name}"
    if record.bytes > MAX_TOKENIZER_BYTES:
        raise TokenizerUnreadable(where, found=f"{record.bytes} bytes", wanted=f"at most {MAX_TOKENIZER_BYTES}")
    require_packages("share", "tokenizers")
    from tokenizers import Tokenizer

    data = dataset.read_file(record)
    if found := too_large(data):  # the library's parser would end the process
        raise TokenizerUnreadable(where, found=found, wanted="fewer")
    try:
        tokenizer = Tokenizer.from_buffer(data)
        return tokenizer, _ByteEncoding(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library's Rust code is not an Exception
        raise TokenizerUnreadable(
            where,
            found=visible(str(error)),
            wanted="a tokenizer.json that this release of tokenizers reads",
            fix="install a newer release of tokenizers, or pull the dataset again",
        ) from None
