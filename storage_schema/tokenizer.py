"""Digests of a tokenizer, and the check that a loaded tokenizer does what its `tokenizer.json` says.

A student can train from a dataset only if its tokenizer has the fingerprint of the teacher's: a digest of the meaning
of the ids. It covers the token of each id, which ids are special, and the merges; not file layout, chat template and
padding settings.

A second digest covers the steps between text and tokens. Stored ids keep their meaning if these differ, and new text
gets other ids. It leaves out the post-processor, which adds `<bos>`: the ids of a dataset hold it already, and
transformers writes it anew from flags that each user sets.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from coldstill.common.errors import first_line

from .errors import TokenizerMismatch, TokenizerNotFound, TokenizerUnfaithful

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""The only names that a tokenizer's files have: those that a capture keeps, and those that are taken from a dataset or
from a student's folder. A file of any other name could replace a model's weights or configuration, or be code."""
TOKENIZER_FOLDER = "tokenizer"
MAX_TOKENIZER_BYTES = 64 << 20
"""Maximum bytes of each file of a tokenizer."""
_MAX_VALUES = 6_000_000
"""Enough for the largest vocabulary that the format allows, with as many merges."""

_SAMPLE_TEXTS = (
    "Hello world, so it is.",
    "  two leading spaces,  two inside, a trailing one ",
    "12345 3.14159 0x1F 1,000,000",
    "line one\nline two\n\n\tindented\r\n",
    "你好，世界。 こんにちは 안녕하세요",
    "Привет, naïve café Straße مرحبا",
    "smile 🙂 👩‍💻 🇫🇷",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # it's code\n",
)
"""Spaces, digits, newlines, scripts, emoji and code: each class of pre-tokenizer treats some of these differently."""

_DEFAULTS = {"use_regex": True, "split": True, "ignore_merges": False, "byte_fallback": False, "fuse_unk": False}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerFacts:
    """`fingerprint`: sha256 in hex. `token_count`: the highest id that the tokenizer can produce, plus one.

    `pipeline_sha256`: of normalizer, pre-tokenizer, decoder and the model's flags, in hex.
    """

    fingerprint: str
    token_count: int
    pipeline_sha256: str

    @property
    def ids(self) -> TokenIds:
        """What decides whether stored ids mean the same."""
        return TokenIds(self.token_count, self.fingerprint)


class TokenIds(NamedTuple):
    """The ids of a tokenizer: their number, and the digest of their meaning."""

    token_count: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.token_count} ids, fingerprint {self.fingerprint[:12]}"


def require_same_ids(where: str, found: TokenIds, wanted: TokenIds, *, of: str, fix: str) -> None:
    """Raise `TokenizerMismatch` unless the ids found at `where` have the meaning of the `wanted` ones, those `of`
    something."""
    if found.fingerprint != wanted.fingerprint:
        raise TokenizerMismatch(where, found=str(found), wanted=f"{wanted} ({of})", fix=fix)


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
        if found := too_large(data):
            raise ValueError(found)
        return _facts(json.loads(data))
    except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerNotFound(
            where, found=f"{type(error).__name__}: {error}"[:300], wanted="a valid tokenizer.json"
        ) from None


def too_large(data: bytes) -> str:
    """What a JSON file of a tokenizer has too much of, as `N bytes`; empty for one that a parser can hold in memory."""
    if len(data) > MAX_TOKENIZER_BYTES:
        return f"{len(data)} bytes"
    return f"more than {_MAX_VALUES} values" if sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES else ""


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
    return TokenizerFacts(hashlib.sha256(text.encode()).hexdigest(), max(tokens) + 1, _pipeline_sha256(document))


def _pipeline(document: dict[str, Any]) -> dict[str, Any]:
    flags = {name: value for name, value in document["model"].items() if name not in ("vocab", "merges")}
    steps = {name: document.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    pipeline: dict[str, Any] = _canonical({**steps, "model": flags})
    return pipeline


def _pipeline_sha256(document: dict[str, Any]) -> str:
    text = json.dumps(_pipeline(document), ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def splits_alike(first: bytes, second: bytes) -> bool:
    """Whether two `tokenizer.json` have the same steps between text and tokens, whatever wrote them.

    Looser than `pipeline_sha256`, which headers store and which therefore stays as it is: when transformers rebuilds a
    tokenizer of Qwen, it writes other flags into the `ByteLevel` decoder, and decoding reads none of them.
    """
    return _steps(first) == _steps(second)


def _steps(tokenizer_json: bytes) -> Any:
    document = json.loads(tokenizer_json)
    steps = _pipeline(document)
    if isinstance(decoder := steps.get("decoder"), dict):
        steps["decoder"] = _without_byte_level_flags(decoder)
    return steps


def _without_byte_level_flags(decoder: dict[str, Any]) -> dict[str, Any]:
    if decoder.get("type") == "ByteLevel":
        return {"type": "ByteLevel"}
    inner = decoder.get("decoders")
    if isinstance(inner, list):
        return {**decoder, "decoders": [_without_byte_level_flags(one) for one in inner if isinstance(one, dict)]}
    return decoder


def _canonical(value: Any) -> Any:
    """Without what some releases of the tokenizers library leave out, at no change of ids and texts: fields that are
    null or have their default, and `trim_offsets`, which changes character offsets alone."""
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _canonical(item)
        for name, item in value.items()
        if item is not None and name != "trim_offsets" and item is not _DEFAULTS.get(name)
    }


def without_code(files: Mapping[str, bytes], *, where: str) -> dict[str, bytes]:
    """The files of a tokenizer, without the `auto_map` of its configuration: it names Python code to load.

    Raises `TokenizerNotFound` for a configuration that is not a JSON object, and for a file that is too large to parse.
    """
    for name, data in files.items():
        if name.endswith(".json") and (much := too_large(data)):
            raise TokenizerNotFound(f"{where}: {name}", found=much, wanted=f"at most {_MAX_VALUES} values")
    found = dict(files)
    if TOKENIZER_CONFIG in found:
        try:
            settings = json.loads(found[TOKENIZER_CONFIG])
            if settings.pop("auto_map", None) is not None:
                found[TOKENIZER_CONFIG] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise TokenizerNotFound(
                f"{where}: {TOKENIZER_CONFIG}", found=first_line(error), wanted="a JSON object"
            ) from None
    return found


def load_faithfully(loaders: Sequence[Callable[[], Any]], tokenizer_json: bytes | None, *, where: str) -> Any:
    """The first loaded tokenizer of transformers that does on a sample text what `tokenizer_json` says.

    transformers rebuilds a tokenizer as the class that `config.json` or `tokenizer_config.json` names. If that is the
    wrong one, spaces or whole scripts can disappear. Raises `TokenizerUnfaithful` if each of the `loaders` does that.
    Without a `tokenizer_json` there is nothing to compare with.
    """
    first = ""
    for load in loaders:
        tokenizer = load()
        found = first_difference(tokenizer, tokenizer_json) if tokenizer_json is not None else ""
        if not found:
            if first:
                logger.warning(
                    "%s: its %s says another thing than the class that transformers loads (%s). The file decides.",
                    where, TOKENIZER_FILE, first,
                )  # fmt: skip
            return tokenizer
        first = first or found
    raise TokenizerUnfaithful(
        f"tokenizer of {where}",
        found=first,
        wanted=f"the ids and texts of its {TOKENIZER_FILE}",
        fix="save the tokenizer again with `save_pretrained` of transformers' PreTrainedTokenizerFast",
    )


def first_difference(tokenizer: Any, tokenizer_json: bytes) -> str:
    """Where a tokenizer of transformers first differs from `tokenizer_json` on the sample texts; empty if nowhere.

    Special tokens are not added: transformers adds them by its own settings.
    """
    from tokenizers import Tokenizer

    stored = Tokenizer.from_str(tokenizer_json.decode())
    stored.no_truncation()
    stored.no_padding()
    for text in _SAMPLE_TEXTS:
        wanted = stored.encode(text, add_special_tokens=False).ids
        found = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if found != wanted:
            return f"{text!r} becomes {len(found)} ids, with the file {len(wanted)}, of which others differ"
        written = tokenizer.decode(wanted, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if written != stored.decode(wanted, skip_special_tokens=False):
            return f"the ids of {text!r} become {written!r}"
    return ""
