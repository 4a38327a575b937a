"""Changes to JSON documents: a field of another type, out of bounds, twice, unknown, too deep, too long."""

from __future__ import annotations

import json
import random
from typing import Any

from .byte_changes import INTERESTING

_RAW = "\x00raw "
"""A string that begins so is written as it is: JSON that Python's own writer would not write."""

_RAW_VALUES = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e-999", "-0", "1.0", "1e2", "0x10", "01", "9" * 5000, "1" + "0" * 400,
    "[" * 2000 + "]" * 2000, '{"a":' * 1500 + "1" + "}" * 1500, "[" * 100_000, '"\\ud800"', '"\\udfff\\ud800"',
    '"\\u0000"', "tru", "'x'", "/* x */ 1", "[1,]", '"\x01"',
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, *INTERESTING, 1 << 64, 10**40, -0.0, 0.5, 1e308, "", "0", "1", "a" * 100_000, "é" * 300,
    "\u202e", "<script>alert(1)</script>", "../x", "/etc/passwd", "C:\\x", "a\\b", "a\x00b", ".", "shards",
    "dataset.json", [], {}, [[]], [None], ["x"] * 300, list(range(3000)), {"": ""}, {"a": {"b": [1]}}, "0" * 64,
    "f" * 64, "imported", "grid", "float16", "exact", "given", "pretrain",
)  # fmt: skip


def change(rng: random.Random, data: bytes) -> bytes:
    """The document after one or two changes; still JSON, or nearly."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        holder, key = rng.choice(_places(document))
        rng.choice((_replace, _replace, _replace, _nudge, _delete, _add, _twice, _swap))(rng, holder, key)
    text = json.dumps(document, indent=rng.choice((None, 2)), ensure_ascii=rng.random() < 0.5)
    return _unwrapped(text).encode("utf-8", "surrogatepass")


def raw(text: str) -> str:
    """A value that is written into the document as it stands."""
    return _RAW + text


def _unwrapped(text: str) -> str:
    mark = json.dumps(_RAW)[1:-1]
    while (start := text.find(f'"{mark}')) >= 0:
        value, end = json.JSONDecoder().raw_decode(text, start)
        text = text[:start] + value[len(_RAW) :] + text[end:]
    return text


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every holder and key in the document."""
    found = []
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else list(range(min(len(value), 20)))
        for key in keys:
            found.append((value, key))
            found += _places(value[key])
    return found or [({}, "")]


def _present(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _replace(rng: random.Random, holder: Any, key: Any) -> None:
    holder[key] = raw(rng.choice(_RAW_VALUES)) if rng.random() < 0.3 else rng.choice(_VALUES)


def _nudge(rng: random.Random, holder: Any, key: Any) -> None:
    value = holder.get(key) if isinstance(holder, dict) else holder[key]
    if isinstance(value, bool) or value is None:
        holder[key] = not value
    elif isinstance(value, (int, float)):
        holder[key] = rng.choice((value + 1, value - 1, -value, value * 2, str(value), float(value), [value]))
    elif isinstance(value, str):
        holder[key] = rng.choice((value + "x", value[:-1], value.upper(), value + "/..", "../" + value, value + "\n"))
    elif isinstance(value, list):
        holder[key] = rng.choice((value * 2, value[:-1], value[::-1], {str(i): item for i, item in enumerate(value)}))
    else:
        holder[key] = [value]


def _delete(rng: random.Random, holder: Any, key: Any) -> None:
    if _present(holder, key):
        del holder[key]


def _add(rng: random.Random, holder: Any, key: Any) -> None:
    value = rng.choice(_VALUES)
    if isinstance(holder, dict):
        holder[rng.choice(("surprise", "", "__class__", "é", "x" * 5000, "format_version"))] = value
    else:
        holder.append(value)


def _twice(rng: random.Random, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        # Keys are strings, so a second one of the same name can only be written raw, behind the value.
        value = json.dumps(holder.get(key), ensure_ascii=True)
        other = json.dumps(rng.choice(_VALUES), ensure_ascii=True)
        holder[key] = raw(f"{value}, {json.dumps(key)}: {other}")
    else:
        holder.insert(key, holder[key])


def _swap(rng: random.Random, holder: Any, key: Any) -> None:
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder))) if len(holder) else key
    if _present(holder, key) and _present(holder, other):
        holder[key], holder[other] = holder[other], holder[key]
