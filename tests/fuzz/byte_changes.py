"""Changes to bytes regardless of their meaning."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

INTERESTING = (
    0, 1, -1, 2, 7, 8, 15, 16, 127, 128, 255, 256, 1023, 1024, 1025, 4095, 4096, 4097, 65_535, 65_536, 1 << 20,
    1 << 24, (1 << 24) + 1, (1 << 31) - 1, -(1 << 31), 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, -(1 << 63),
)  # fmt: skip
"""Numbers at which something may overflow, be negative, or be refused."""


def change(rng: random.Random, data: bytes) -> bytes:
    """`data` after one to four changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_CHANGES)(rng, data)
    return data


def _flip_bit(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(max(len(data), 1))
    return data[:place] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[place : place + 1]) + data[place + 1 :]


def _set_byte(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(max(len(data), 1))
    return data[:place] + bytes([rng.choice((0, 255, 128, 127, rng.randrange(256)))]) + data[place + 1 :]


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((rng.randrange(len(data) + 1), max(len(data) - rng.randrange(1, 16), 0)))]


def _extend(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((rng.randbytes(rng.randrange(1, 64)), bytes(rng.randrange(1, 5000)), data))


def _piece(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 64, 300)))


def _delete(rng: random.Random, data: bytes) -> bytes:
    start, stop = _piece(rng, data)
    return data[:start] + data[stop:]


def _duplicate(rng: random.Random, data: bytes) -> bytes:
    start, stop = _piece(rng, data)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 2, 50)) + data[stop:]


def _swap(rng: random.Random, data: bytes) -> bytes:
    first, second = sorted((_piece(rng, data), _piece(rng, data)))
    if first[1] > second[0]:
        return data
    middle = data[first[1] : second[0]]
    return data[: first[0]] + data[slice(*second)] + middle + data[slice(*first)] + data[second[1] :]


def _number(rng: random.Random, data: bytes) -> bytes:
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice(INTERESTING) & (1 << 8 * width) - 1
    place = rng.randrange(len(data) + 1)
    return data[:place] + struct.pack("<Q", value)[:width] + data[place + width :]


_CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip_bit, _flip_bit, _set_byte, _truncate, _extend, _delete, _duplicate, _swap, _number, _number,
)  # fmt: skip
