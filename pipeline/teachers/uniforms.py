"""Uniform numbers for the tail draws: a function of (dataset seed, sample id, position, draw), whatever the batching.

Shape letters: `N` target positions, `D` draws.
"""

from __future__ import annotations

import hashlib

import numpy as np

_WORDS_PER_COUNT = 4  # Philox4x64 gives four 64-bit words per counter value


def draw_uniforms(positions: np.ndarray, *, draws: int, seed: int, sample_id: str) -> np.ndarray:
    """`float64 [N, D]` in [0, 1) for ascending target `positions int64 [N]` of one sample.

    Philox4x64-10 (Salmon et al., SC 2011; numpy's), key = (seed, first 8 bytes of sha256 of the sample id), counter =
    position times the counter values that D draws take. Each number is the high 53 bits of a word.
    """
    if not positions.size:
        return np.empty((0, draws))
    sample_key = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "little")
    counts = -(-draws // _WORDS_PER_COUNT)
    first, last = int(positions[0]), int(positions[-1])
    generator = np.random.Philox(key=np.array([seed, sample_key], np.uint64)).advance(first * counts)
    words = generator.random_raw((last - first + 1, counts * _WORDS_PER_COUNT))
    return (words[positions - first, :draws] >> np.uint64(11)) * 2.0**-53
