"""Wrong headers: a number changed in `dataset.json` and in the footers alike, or only in one of them."""

from __future__ import annotations

import json
import random
from typing import Any

from coldstill.storage_schema.header import HEADER_NAME

from . import json_text
from .parquet_parts import Parts
from .tree import Tree


def lie(rng: random.Random, tree: Tree) -> None:
    """Another top_k, vocabulary, codec, rank table or the like everywhere."""
    document = json.loads(tree.files[HEADER_NAME])
    for _ in range(rng.choice((1, 1, 2))):
        _change(rng, document)
    _spread(rng, tree, json.dumps(document, indent=2).encode())


def lie_with_any_field(rng: random.Random, tree: Tree) -> None:
    """Any field, changed as a JSON document is, everywhere."""
    _spread(rng, tree, json_text.change(rng, tree.files[HEADER_NAME]))


def disagree(rng: random.Random, tree: Tree) -> None:
    """One shard's footer has another header than the dataset."""
    name = rng.choice(tree.named("shards/"))
    parts = Parts(tree.files[name])
    action = rng.randrange(4)
    if action == 0:
        parts.set_header(json_text.change(rng, tree.files[HEADER_NAME]))
    elif action == 1:
        parts.key_values.clear()
    elif action == 2:
        parts.key_values.append(parts.key_values[0])
    else:
        parts.set_header(rng.choice((b"", b"{}", b"\xff", b" " * (1 << 20), tree.files[HEADER_NAME] * 2)))
    tree.files[name] = parts.to_bytes()


def _spread(rng: random.Random, tree: Tree, header: bytes) -> None:
    tree.files[HEADER_NAME] = header
    for name in tree.named("shards/"):
        parts = Parts(tree.files[name])
        parts.set_header(header)
        tree.files[name] = parts.to_bytes()


def _change(rng: random.Random, document: dict[str, Any]) -> None:
    name = rng.choice(("top_k", "token_count", "draws", "codec", "id_ranks", "draw_logprobs", "max_length", "name"))
    count = document["token_count"]
    if name == "top_k":
        document["top_k"] = rng.choice((1, document["top_k"] - 1, document["top_k"] + 1, 255, 256, count, 4096))
    elif name == "token_count":
        document["token_count"] = rng.choice((1, 8, 255, 256, 300, count - 1, count + 1, 65_536, 65_537, 1 << 20))
        document["vocab_size"] = max(document["token_count"], rng.choice((1, 400, 1 << 20)))
    elif name == "draws":
        document["draws"] = rng.choice((0, 1, 255, 256, 1024))
        document["kept_draws"] = rng.choice((0, 1, document["kept_draws"], 255, 256, 1024))
    elif name == "codec":
        codec = document["codec"]
        codec["a"] = rng.choice((0, 1, 2, codec["a"] or 7, 4096, 32_768))
        codec["b"] = rng.choice((1, 2, 8, 255, 256))
    elif name == "name":
        exact = document["codec"]["name"] == "float16"
        kind = {"name": "grid", "a": 100, "b": 8} if exact else {"name": "float16", "a": None, "b": None}
        document["codec"].update(kind)
    elif name == "id_ranks":
        document["id_ranks"] = rng.sample(range(count), rng.choice((0, 1, count // 2, count)))
    elif name == "draw_logprobs":
        document["draw_logprobs"] = not document["draw_logprobs"]
    else:
        document["max_length"] = rng.choice((2, 5, 10, 1 << 20))
