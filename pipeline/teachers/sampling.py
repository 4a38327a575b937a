"""How the teacher chooses the next token of an answer, and the random numbers of each answer. Numpy only.

Shape letters: `V` token ids.
"""

from __future__ import annotations

import hashlib

import numpy as np


def next_token(logits: np.ndarray, *, temperature: float, top_p: float, uniform: float) -> int:
    """A token from `logits float [V]` by one number `uniform` of [0, 1).

    Temperature 0 takes the most probable token, the lowest id of equals. Otherwise the softmax of `logits /
    temperature` is cut to its most probable tokens of mass `top_p` (Holtzman et al., arXiv 1904.09751), and the token
    is where the cumulative sum passes `uniform` times that mass. In float64: a float32 sum over 150,000 entries is off
    by more than many of them weigh.
    """
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    if top_p == 1:
        return _inverse(weights, uniform)
    kept = top_p_set(weights / weights.sum(), top_p)
    return int(kept[_inverse(weights[kept], uniform)])


def top_p_set(probs: np.ndarray, top_p: float) -> np.ndarray:
    """`int64 [n]`: the fewest most probable ids of `probs float64 [V]` whose mass is at least `top_p`, most probable
    first, ties by id; never none."""
    order = np.argsort(-probs, kind="stable")
    reached = int(np.searchsorted(np.cumsum(probs[order]), top_p))
    return order[: reached + 1]


def answer_uniforms(*, seed: int, sample_id: str, number: int, count: int) -> np.ndarray:
    """`float64 [count]` in [0, 1): the numbers that answer `number` to a prompt is sampled with, one per token.

    Philox4x64-10 as in uniforms.py, with a key of its own: the tail draws of an answer must not follow its tokens.
    """
    key = np.array([seed, _answer_key(sample_id, number)], np.uint64)
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53


def answer_seed(*, seed: int, sample_id: str, number: int) -> int:
    """Below 2^63: the seed of one answer, for an engine that samples by itself."""
    return (_answer_key(sample_id, number) >> 1) ^ seed


def _answer_key(sample_id: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"answer {number}\n{sample_id}".encode()).digest()[:8], "little")


def _inverse(weights: np.ndarray, uniform: float) -> int:
    cumulative = np.cumsum(weights)
    # A rounding of the product must not step past the last entry that has any weight.
    depth = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0))
    return int(np.searchsorted(cumulative, depth, side="right"))
