"""Random numbers of data loading, functions of the seed and a place in the data.

The numbers decide the order of shards, row groups and rows, the dataset of each row of a mixture, and which draws stay.
Each is a word of Philox4x64-10 (see `common.rng`) with the seed in the key and the place in the counter. No number
depends on those drawn before it, so a run resumes anywhere. The raw words are equal in every release of numpy; numpy
does not guarantee that for its `permutation`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from coldstill.common.rng import WORDS_PER_COUNT, to_uniforms

MIXTURE_BLOCK = 1024
"""Uniforms of a mixture that are computed together."""


class Purpose(IntEnum):
    """What a word is used for. No two purposes share a word."""

    SHARDS = 1
    GROUPS = 2
    ROWS = 3
    MIXTURE = 4
    DRAWS = 5


def words(count: int, *, seed: int, purpose: Purpose, key: int = 0, first: int = 0, place: int = 0) -> np.ndarray:
    """`uint64 [count]`: words of (`seed`, `purpose`, `key`, `place`), starting at counter value `first`."""
    counter = np.array([first, place, purpose, 0], np.uint64)
    return np.random.Philox(key=np.array([seed, key], np.uint64), counter=counter).random_raw(count)


def permutation(size: int, *, seed: int, purpose: Purpose, key: int, place: int = 0) -> np.ndarray:
    """`int64 [size]`: the numbers below `size`, shuffled."""
    return np.argsort(words(size, seed=seed, purpose=purpose, key=key, place=place), kind="stable")


def mixture_uniforms(block: int, *, seed: int) -> np.ndarray:
    """`float64 [1024]` in [0, 1): the uniforms that choose the datasets of rows `1024 block` to `1024 block + 1023`."""
    first = block * (MIXTURE_BLOCK // WORDS_PER_COUNT)
    return to_uniforms(words(MIXTURE_BLOCK, seed=seed, purpose=Purpose.MIXTURE, first=first))


def words_of_positions(positions: np.ndarray, count: int, *, seed: int, key: int) -> np.ndarray:
    """`uint64 [N, count]`: words of the ascending `positions int64 [N]` of the sample that `key` identifies."""
    counts = -(-count // WORDS_PER_COUNT)
    first, last = int(positions[0]), int(positions[-1])
    span = (last - first + 1, counts * WORDS_PER_COUNT)
    found = words(span[0] * span[1], seed=seed, purpose=Purpose.DRAWS, key=key, first=first * counts)
    return found.reshape(span)[positions - first, :count]
