"""A small invented language whose entropy is known, for benchmarks of small models.

Text is a Markov chain of words: each word has a few successors with fixed probabilities. How far a model is from the
entropy of the source can be measured, which is not possible on real text.

Shape letters: `W` words, `S` successors of each.
"""

from __future__ import annotations

import math

import numpy as np

WORDS, SUCCESSORS = 600, 12
"""W and S."""
NUMBER_SHARE = 0.06
"""Of the words that are numbers, so that tokenizers that split digits differ from those that do not."""
SENTENCE_END = 0.1
"""Probability that a word ends its sentence."""


class InventedLanguage:
    """`words`: the W words. `successors int64 [W, S]`, `probabilities float64 [W, S]`."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.words = _words(rng)
        frequency = 1 / (np.arange(WORDS) + 10)
        frequency /= frequency.sum()
        self.successors = np.stack([rng.choice(WORDS, SUCCESSORS, replace=False, p=frequency) for _ in range(WORDS)])
        self.probabilities = rng.dirichlet(np.full(SUCCESSORS, 0.6), size=WORDS)

    def texts(self, count: int, *, characters: int, seed: int) -> list[str]:
        """`count` rows of at least `characters` characters, of whole words."""
        rng = np.random.default_rng([seed, 1])
        found = []
        for _ in range(count):
            word, parts, length = int(rng.integers(WORDS)), list[str](), 0
            while length < characters:
                parts.append(self.words[word] + ("." if rng.random() < SENTENCE_END else ""))
                length += len(parts[-1]) + 1
                word = int(self.successors[word, rng.choice(SUCCESSORS, p=self.probabilities[word])])
            found.append(" ".join(parts))
        return found

    def entropy(self) -> float:
        """Bits per byte of a long text: the least that any model can reach."""
        chain = np.zeros((WORDS, WORDS))
        np.put_along_axis(chain, self.successors, self.probabilities, axis=1)
        share = np.full(WORDS, 1 / WORDS)
        for _ in range(500):
            share = share @ chain
        of_word = -(self.probabilities * np.log2(self.probabilities.clip(1e-300))).sum(1)
        of_end = -sum(p * math.log2(p) for p in (SENTENCE_END, 1 - SENTENCE_END))
        lengths = np.array([len(word) for word in self.words]) + 1 + SENTENCE_END
        return float((share @ of_word + of_end) / (share @ lengths))


def _words(rng: np.random.Generator) -> list[str]:
    syllables = [one + two for one in "bdfgklmnprstvz" for two in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < WORDS:
        if rng.random() < NUMBER_SHARE:
            word = str(rng.integers(10, 10_000))
        else:
            word = "".join(rng.choice(syllables, rng.integers(1, 4))) + str(rng.choice(["", "", "n", "s", "r"]))
        found[word] = None
    return list(found)
