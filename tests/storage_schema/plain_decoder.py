"""A second decoder, written from FORMAT.md alone: plain Python and zstd, no numpy, nothing of ours.

The column values of a row in a shard become one dictionary per position. Slow and obvious on purpose.
"""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import zstandard


def decode_row(row: dict[str, Any], header: dict[str, Any]) -> list[dict[str, Any]]:
    """The target positions of a row, each with `ids`, `logprobs`, `levels` (codec grid), `log_tail`, `label_logprob`,
    `draws` and `draw_logprobs`, entries in the order in which they are stored."""
    spans = row["target_spans"]
    positions = [t for i in range(0, len(spans), 2) for t in range(spans[i], spans[i + 1])]
    labels = [row["token_ids"][t + 1] for t in positions]
    by_rank = ids_by_rank(header)
    width = 2 if header["token_count"] <= 65_536 else 3

    counts = planes(stream(row, "counts"), 1 if header["top_k"] <= 255 else 2) or [header["top_k"]] * len(positions)
    entries = (grid_entries if header["codec"]["name"] == "grid" else half_entries)(row, header, counts, by_rank, width)
    draw_counts = planes(stream(row, "draw_counts"), 1 if header["kept_draws"] <= 255 else 2) or [0] * len(positions)
    distances = escaped(stream(row, "draw_ids"), stream(row, "draw_id_escapes"), width)
    draw_logprobs = halves(stream(row, "draw_logprobs"))
    label_logprobs = halves(stream(row, "label_logprob"))

    decoded = []
    for position, label, draws in zip(entries, labels, draw_counts, strict=True):
        log_mass = math.log(sum(math.exp(x) for x in [*position["logprobs"], position["log_tail"]]))
        position["logprobs"] = [x - log_mass for x in position["logprobs"]]
        position["log_tail"] -= log_mass
        if label in position["ids"]:
            position["label_logprob"] = position["logprobs"][position["ids"].index(label)]
        else:
            position["label_logprob"] = label_logprobs.pop(0) - log_mass
        rank, position["draws"], position["draw_logprobs"] = 0, [], []
        for _ in range(draws):
            rank += distances.pop(0)
            position["draws"].append(by_rank[rank])
            if header["draw_logprobs"]:
                position["draw_logprobs"].append(draw_logprobs.pop(0))
        decoded.append(position)
    assert not distances
    assert not label_logprobs
    return decoded


def media_of(row: dict[str, Any], header: dict[str, Any], root: Path) -> list[tuple[int, str, bytes]]:
    """Position, type and content of the row's media, whose placeholders the header names."""
    placeholder = header["about"]["processor"]["settings"]["image_token_id"]
    found = []
    for item in row["media"]:
        content = item["bytes"] if item["path"] is None else (root / item["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == item["sha256"]
        assert (item["path"] is not None) == (len(content) > header["about"]["media_in_row_bytes"])
        found.append((item["position"], item["type"], content))
    assert [place for place, id_ in enumerate(row["token_ids"]) if id_ == placeholder] == [one[0] for one in found]
    return found


def grid_entries(
    row: dict[str, Any], header: dict[str, Any], counts: list[int], by_rank: list[int], width: int
) -> list[dict[str, Any]]:
    """Kept entries of codec `grid`, before they are normalized."""
    deltas = escaped(stream(row, "ids"), stream(row, "id_escapes"), width)
    below = escaped(stream(row, "logprobs"), stream(row, "logprob_escapes"), 2)
    last_levels, tails = planes(stream(row, "last_levels"), 2), planes(stream(row, "log_tail"), 2)
    a, b = header["codec"]["a"], header["codec"]["b"]
    positions = []
    for count, last, tail in zip(counts, last_levels, tails, strict=True):
        rank, ids, levels = -1, [], []
        for _ in range(count):
            rank += deltas.pop(0) + 1
            ids.append(by_rank[rank])
            levels.append(last - below.pop(0))
        logprobs = [logprob_of(level, a, b) for level in levels]
        positions.append({"ids": ids, "levels": levels, "logprobs": logprobs, "log_tail": logprob_of(tail, a, b)})
    assert not deltas
    assert not below
    return positions


def half_entries(
    row: dict[str, Any], header: dict[str, Any], counts: list[int], by_rank: list[int], width: int
) -> list[dict[str, Any]]:
    """Kept entries of codec `float16`, before they are normalized."""
    ids, logprobs = planes(stream(row, "ids"), width), halves(stream(row, "logprobs"))
    positions = []
    for count, log_tail in zip(counts, halves(stream(row, "log_tail")), strict=True):
        positions.append({"ids": ids[:count], "levels": [], "logprobs": logprobs[:count], "log_tail": log_tail})
        ids, logprobs = ids[count:], logprobs[count:]
    assert not ids
    return positions


def logprob_of(level: int, a: int, b: int) -> float:
    """The log-prob that a level reads as."""
    low, high = 0.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        if a * (1 - math.exp(-middle / 2)) + b * middle < level:
            low = middle
        else:
            high = middle
    return -high


def ids_by_rank(header: dict[str, Any]) -> list[int]:
    """The id of every rank."""
    listed = header["id_ranks"]
    others = set(listed)
    return [*listed, *(i for i in range(header["token_count"]) if i not in others)]


def stream(row: dict[str, Any], name: str) -> bytes:
    """The content of a stream."""
    return zstandard.decompress(row[name]) if row[name] else b""


def planes(raw: bytes, width: int) -> list[int]:
    """Integers of `width` planes."""
    count = len(raw) // width
    return [sum(raw[plane * count + i] << 8 * plane for plane in range(width)) for i in range(count)]


def escaped(raw: bytes, escapes: bytes, width: int) -> list[int]:
    """Integers of one byte each, and what is above 255."""
    above = planes(escapes, width)
    values = [byte + above.pop(0) if byte == 255 else byte for byte in raw]
    assert not above
    return values


def halves(raw: bytes) -> list[float]:
    """Float16 values of two planes."""
    count = len(raw) // 2
    return [struct.unpack("<e", bytes((raw[i], raw[count + i])))[0] for i in range(count)]
