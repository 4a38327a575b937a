"""Integers and float16 values as bytes in the order that zstd compresses best, and back.

Planes: all lowest bytes, then all next bytes, and so on. High bytes repeat, which zstd uses.
Escapes: one byte per value, where 255 means "255 or more"; the excess over 255 is stored in a separate stream.
"""

from __future__ import annotations

import numpy as np

ESCAPE = 255


def to_planes(values: np.ndarray, width: int) -> np.ndarray:
    """`uint8 [width * n]`: the `width` lowest bytes of unsigned integers `[n]`, plane by plane."""
    value_bytes = np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(value_bytes[:, :width].T).reshape(-1)


def from_planes(planes: np.ndarray) -> np.ndarray:
    """`int32 [n]` from planes `uint8 [width, n]`."""
    values = planes[0].astype(np.int32)
    for plane in range(1, len(planes)):
        values |= planes[plane].astype(np.int32) << (8 * plane)
    return values


def to_escapes(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """One byte `uint8 [n]` per integer >= 0, and the planes of the excess over 255 of the escaped ones."""
    short = np.minimum(values, ESCAPE).astype(np.uint8)
    return short, to_planes(values[short == ESCAPE] - ESCAPE, width)


def half_planes(logprobs: np.ndarray) -> np.ndarray:
    """`uint8 [2 n]`: log-probs as float16 in two planes, values above 0 stored as 0."""
    halves = np.minimum(logprobs, 0).astype("<f2")
    return np.ascontiguousarray(halves.view(np.uint8).reshape(-1, 2).T).reshape(-1)


def from_half_planes(planes: np.ndarray) -> np.ndarray:
    """`float32 [n]` from the two planes `uint8 [2, n]` of float16."""
    return np.ascontiguousarray(planes.T).view("<f2").reshape(-1).astype(np.float32)
