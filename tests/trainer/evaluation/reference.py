"""Slow, obvious references for the evaluation's figures, one position and one id at a time, in float64. Imports nothing
of ours.

`p`, `q` are `[V]` distributions of teacher and student; `kept` are the ids that a cache holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def softmax(scores: np.ndarray) -> np.ndarray:
    """`[V]` probabilities of `[V]` scores."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    """`KL(p || q)` in nats; `0 log 0 = 0`."""
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def bucket(p: np.ndarray, kept: Sequence[int]) -> list[float]:
    """The kept ids, and all others as one symbol."""
    rest = sum(p[v] for v in range(len(p)) if v not in kept)
    return [*(p[v] for v in kept), rest]


def soft_cross_entropy(p: np.ndarray, q: np.ndarray) -> float:
    """`-sum p log q`."""
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


def ranked(p: np.ndarray) -> list[int]:
    """Ids from the most probable on, equal ones by id."""
    return sorted(range(len(p)), key=lambda v: (-p[v], v))


def last_fifth(p: np.ndarray) -> list[int]:
    """The ids of the 80th to 100th percentile of the ranking."""
    return ranked(p)[math.floor(0.8 * len(p)) :]


def mass(q: np.ndarray, ids: Sequence[int]) -> float:
    """What `q` puts on `ids`."""
    return float(sum(q[v] for v in ids))


def expected_calibration_error(confidences: Sequence[float], hits: Sequence[bool], *, bins: int = 15) -> float:
    """Guo et al. 2017, equation 5, bin by bin."""
    error = 0.0
    for b in range(bins):
        inside = [n for n, value in enumerate(confidences) if b / bins < value <= (b + 1) / bins]
        if inside:
            accuracy = sum(hits[n] for n in inside) / len(inside)
            confidence = sum(confidences[n] for n in inside) / len(inside)
            error += len(inside) / len(confidences) * abs(accuracy - confidence)
    return error


def all_draws(p: np.ndarray, count: int) -> Iterator[tuple[float, list[int]]]:
    """Every outcome of `count` iid draws from `p`: its probability, and the draws in order."""
    for outcome in itertools.product(range(len(p)), repeat=count):
        yield math.prod(p[v] for v in outcome), list(outcome)


def rouge_l(answer: str, reference: str, *, stem: Callable[[str], str]) -> float:
    """F1 of the longest common subsequence of words: lower case, letters and digits; `stem` is for words of more than
    three signs."""
    texts = ("".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()) for text in (answer, reference))
    a, b = ([stem(word) if len(word) > 3 else word for word in text.split()] for text in texts)
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, word in enumerate(a):
        for j, other in enumerate(b):
            longest[i + 1][j + 1] = longest[i][j] + 1 if word == other else max(longest[i][j + 1], longest[i + 1][j])
    common = longest[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0
