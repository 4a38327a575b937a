"""Uniform numbers from the random words of a counter-based generator.

The words come from Philox4x64-10 (Salmon et al., SC 2011): each is a function of a key and a counter, and does not
depend on earlier draws. numpy guarantees that the raw stream of its `Philox` does not change between releases.
"""

from __future__ import annotations

import numpy as np

WORDS_PER_COUNT = 4
"""Philox4x64 gives four 64-bit words per counter value."""


def to_uniforms(words: np.ndarray) -> np.ndarray:
    """`float64` in [0, 1) from `uint64` words of the same shape: the high 53 bits of each."""
    return (words >> np.uint64(11)) * 2.0**-53
