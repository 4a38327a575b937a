"""Integers and halves as byte lists, the form that zstd compresses best. Arrays in, `uint8` arrays out, and back.

Planes: all lowest bytes, then all next bytes, and so on: high bytes repeat, and zstd sees it.
Escapes: one byte per value, 255 standing for "255 or more"; what is above is listed in a stream of its own.
"""

from __future__ import annotations

import numpy as np

ESCAPE = 255


def to_planes(values: np.ndarray, width: int) -> np.ndarray:
    """`uint8 [width * n]`: the `width` lowest bytes of unsigned integers `[n]`, plane by plane."""
    octets = np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(octets[:, :width].T).reshape(-1)


def from_planes(planes: np.ndarray) -> np.ndarray:
    """`int32 [n]` from planes `uint8 [width, n]`."""
    values = planes[0].astype(np.int32)
    for plane in range(1, len(planes)):
        values |= planes[plane].astype(np.int32) << (8 * plane)
    return values


def to_escapes(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """`uint8 [n]` and the planes of what the escaped ones have above 255; for integers from 0 on."""
    short = np.minimum(values, ESCAPE).astype(np.uint8)
    return short, to_planes(values[short == ESCAPE] - ESCAPE, width)


def half_planes(logprobs: np.ndarray) -> np.ndarray:
    """`uint8 [2 n]`: log-probs as float16 in two planes; at most 0."""
    halves = np.minimum(logprobs, 0).astype("<f2")
    return np.ascontiguousarray(halves.view(np.uint8).reshape(-1, 2).T).reshape(-1)


def from_half_planes(planes: np.ndarray) -> np.ndarray:
    """`float32 [n]` from the two planes `uint8 [2, n]` of float16."""
    return np.ascontiguousarray(planes.T).view("<f2").reshape(-1).astype(np.float32)
