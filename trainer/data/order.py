"""The order of things, as a function of a seed and a place alone: shards of an epoch, row groups of a shard, rows of a
window, datasets of a mixture.

Every number is a word of Philox4x64-10 (Salmon et al., SC 2011; numpy's) with the seed in the key and the place in the
counter: nothing depends on what was drawn before, so a run goes on anywhere, and raw words are the same in every
release of numpy, which its `permutation` does not promise.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_WORDS_PER_COUNT = 4
"""Philox4x64 gives four 64-bit words per counter value."""
MIXED_AT_ONCE = 1024


class Purpose(IntEnum):
    """What a word is for: no two purposes share one."""

    SHARDS = 1
    GROUPS = 2
    ROWS = 3
    MIXTURE = 4
    DRAWS = 5


def words(count: int, *, seed: int, purpose: Purpose, key: int = 0, first: int = 0, place: int = 0) -> np.ndarray:
    """`uint64 [count]` words of (`seed`, `purpose`, `key`, `place`), from counter value `first` on."""
    counter = np.array([first, place, purpose, 0], np.uint64)
    return np.random.Philox(key=np.array([seed, key], np.uint64), counter=counter).random_raw(count)


def permutation(size: int, *, seed: int, purpose: Purpose, key: int, place: int = 0) -> np.ndarray:
    """`int64 [size]`: the numbers below `size`, shuffled."""
    return np.argsort(words(size, seed=seed, purpose=purpose, key=key, place=place), kind="stable")


def uniforms_at(block: int, *, seed: int) -> np.ndarray:
    """`float64 [1024]` in [0, 1): those that choose datasets number `1024 block` and following."""
    first = block * (MIXED_AT_ONCE // _WORDS_PER_COUNT)
    return (words(MIXED_AT_ONCE, seed=seed, purpose=Purpose.MIXTURE, first=first) >> np.uint64(11)) * 2.0**-53


def words_of_positions(positions: np.ndarray, count: int, *, seed: int, key: int) -> np.ndarray:
    """`uint64 [N, count]`: words of ascending `positions int64 [N]` of the sample that `key` names."""
    counts = -(-count // _WORDS_PER_COUNT)
    first, last = int(positions[0]), int(positions[-1])
    span = (last - first + 1, counts * _WORDS_PER_COUNT)
    found = words(span[0] * span[1], seed=seed, purpose=Purpose.DRAWS, key=key, first=first * counts)
    return found.reshape(span)[positions - first, :count]
