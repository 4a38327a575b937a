"""What a stranger puts into a dataset whose digests are all right: names that would be written, texts that multiply."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

from coldstill.storage_schema.manifest import MANIFEST_NAME

from . import shard_rows
from .tree import Tree

TOKENIZER = "tokenizer/tokenizer.json"
SETTINGS = "tokenizer/tokenizer_config.json"
NAMES = (
    *("model.safetensors", "pytorch_model.bin", "config.json", "generation_config.json", "adapter_config.json"),
    *("evil.py", "tokenizer.py", "Tokenizer.json", "tokenizer.json ", "tokenizer.json.", "TOKENIZER_CONFIG.JSON"),
    *("CON", "nul.json", "tokenizer\u2024json", "to\u212aenizer.json", "README.md", ".gitattributes", "manifest.json"),
)
FOLDERS = ("tokenizer/", "Tokenizer/", "", "shards/", "rejects/", "media/", "card/", "_run/")
LONG = 1 << 20


def plant_a_file(rng: random.Random, tree: Tree) -> None:
    """A file of a model, of code or of another spelling, listed with its right size and digest."""
    _list(tree, rng.choice(FOLDERS) + rng.choice(NAMES), b"planted")
    _make_loadable(tree)


def name_code(rng: random.Random, tree: Tree) -> None:
    """Settings of the tokenizer that name code to load, or are no settings."""
    auto_map: Any = {"AutoTokenizer": ["some-org/evil--evil.Evil", None]}
    document = rng.choice(({"auto_map": auto_map}, {"auto_map": "evil.Evil"}, [auto_map], auto_map, "x", None))
    _list(tree, SETTINGS, json.dumps(document).encode())


def lengthen_tokens(rng: random.Random, tree: Tree) -> None:
    """Tokens of up to a megabyte, on every position of every row of a shard."""
    document = json.loads(tree.files[TOKENIZER])
    vocabulary = document["model"]["vocab"]
    text = rng.choice(("a", "\x1b", "\U000e0001", "\u0120", "\n")) * rng.choice((LONG // 4, 5_000, 300))
    chosen = rng.sample(sorted(vocabulary), rng.choice((1, 1, 4)))
    document["model"]["vocab"] = {token + text * (token in chosen): number for token, number in vocabulary.items()}
    tree.files[TOKENIZER] = json.dumps(document, ensure_ascii=False).encode()
    _make_loadable(tree)


def lengthen_texts(rng: random.Random, tree: Tree) -> None:
    """An id or metadata of a megabyte, or metadata that indents multiply."""
    name = rng.choice(tree.named("shards/"))
    rows = shard_rows.rows_of(tree.files[name])
    sign = rng.choice(("x", "\u202e", "\U000e0001", "<"))
    row = rng.choice(rows)
    action = rng.randrange(3)
    if action == 0:
        row["sample_id"] = sign * (LONG // len(sign.encode()) // 2)
    elif action == 1:
        row["metadata"] = json.dumps({"a": sign * (LONG // 16)})
    else:
        depth = rng.choice((10, 300, 800))
        row["metadata"] = '{"a":' + "[" * depth + ",".join("1" * 20_000) + "]" * depth + "}"
    tree.files[name] = shard_rows.write_rows(rows, header=shard_rows.header_of(tree.files[name]), group_rows=1)
    _make_loadable(tree)


def _make_loadable(tree: Tree) -> None:
    """The same tokens in a file that the tokenizers library loads, so that `inspect` shows the rows."""
    model = json.loads(tree.files[TOKENIZER])["model"]
    steps = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    words = {"type": "WordLevel", "vocab": model["vocab"], "unk_token": next(iter(model["vocab"]))}
    document = {"version": "1.0", **steps, "added_tokens": [], "model": words}
    tree.files[TOKENIZER] = json.dumps(document, ensure_ascii=False).encode()


def _list(tree: Tree, name: str, content: bytes) -> None:
    """A file in the manifest; its digest is made right where the tree is resealed."""
    document = json.loads(tree.files[MANIFEST_NAME])
    document["files"] = [file for file in document["files"] if file["name"] != name]
    digest = hashlib.sha256(content).hexdigest()
    document["files"].append({"name": name, "bytes": len(content), "sha256": digest})
    tree.files[MANIFEST_NAME] = json.dumps(document, indent=2).encode()
    if name != MANIFEST_NAME:
        tree.files[name] = content
