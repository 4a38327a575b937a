"""The files of a mutant, and the repair of their digests after a change ("resealing")."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from coldstill.storage_schema.manifest import MANIFEST_NAME


class Tree:
    """Files by name, to be changed in place."""

    def __init__(self, files: dict[str, bytes]):
        self.files = dict(files)

    def named(self, *parts: str) -> list[str]:
        """Sorted names that begin with one of `parts`."""
        return sorted(name for name in self.files if name.startswith(parts))

    def reseal(self) -> None:
        """Give every file the size, digest and (shards, rejects) name that manifest and commit records say it has."""
        documents = {name: _parsed(self.files[name]) for name in self.named(MANIFEST_NAME, "commits/")}
        renamed: dict[str, str] = {}
        for document in documents.values():
            for record in _records(document, 0):
                old = record["name"]
                data = self.files.get(renamed.get(old, old))
                if data is None:
                    continue
                digest = hashlib.sha256(data).hexdigest()
                new = _digest_name(old, digest)
                if new != old and old in self.files:
                    self.files[new] = self.files.pop(old)
                    renamed[old] = new
                record.update(name=new, bytes=len(data), sha256=digest)
        for name, document in documents.items():
            if document is not None:
                self.files[name] = json.dumps(document, indent=2).encode()

    def recount(self, shard: int, *, rows: int, tokens: int, targets: int) -> None:
        """Make the manifest's counts of a shard, and its sums, those given."""
        document = json.loads(self.files[MANIFEST_NAME])
        document["shards"][shard].update(rows=rows, tokens=tokens, targets=targets)
        for name in ("rows", "tokens", "targets"):
            document[name] = sum(item[name] for item in document["shards"])
        self.files[MANIFEST_NAME] = json.dumps(document, indent=2).encode()


def _parsed(data: bytes) -> Any:
    """A JSON document; none where a change has left none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _records(value: Any, depth: int) -> list[dict[str, Any]]:
    if depth > 8:
        return []
    if isinstance(value, dict):
        if {"name", "bytes", "sha256"} <= set(value):
            return [value]
        return [record for inner in value.values() for record in _records(inner, depth + 1)]
    if isinstance(value, list):
        return [record for inner in value for record in _records(inner, depth + 1)]
    return []


def _digest_name(name: str, digest: str) -> str:
    """Shards and rejects are named `folder/UUUUUU-DDDDDDDDDDDD.ending`."""
    folder, _, last = name.rpartition("/")
    if folder not in ("shards", "rejects", "faithfulness") or "-" not in last or "." not in last:
        return name
    return f"{folder}/{last.split('-')[0]}-{digest[:12]}.{last.rsplit('.', 1)[1]}"
