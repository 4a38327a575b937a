"""The loss of a codec: KL divergences in nats between exact and stored distributions.

Buckets are the kept ids and the tail. The exact side is renormalized in float64, because a float32 log-softmax over
32,000 ids is off by 5e-6, half of what the fine preset may lose.

Shape letters: `N` target positions, `K` kept ids.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Kept(Protocol):
    """A decoded row of any codec: `ids`, `logprobs` and `kept` are `[N, K]`, `log_tail` is `[N]`."""

    @property
    def ids(self) -> np.ndarray:
        """Token ids."""

    @property
    def logprobs(self) -> np.ndarray:
        """Natural logs of the probabilities."""

    @property
    def kept(self) -> np.ndarray:
        """Which entries are in use."""

    @property
    def log_tail(self) -> np.ndarray:
        """Natural log of the mass outside the kept ids."""


def kl_nats(exact: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """`float64 [N]`: KL(exact || stored) of natural logs `[N, K + 1]`, both sides renormalized; -inf is no mass."""
    exact, stored = _normalized(exact), _normalized(stored)
    held = np.isfinite(exact)
    difference = np.subtract(exact, stored, out=np.zeros_like(exact), where=held)
    return (np.exp(exact) * difference).sum(-1)


def buckets(targets: Kept) -> np.ndarray:
    """`float64 [N, K + 1]`: natural logs of the kept ids in the order of ids, unused entries last, then the tail."""
    kept = targets.kept
    order = np.argsort(np.where(kept, targets.ids, np.iinfo(np.int32).max), axis=1, kind="stable")
    logprobs = np.where(kept, targets.logprobs, -np.inf).astype(np.float64)
    return np.concatenate([np.take_along_axis(logprobs, order, 1), targets.log_tail.astype(np.float64)[:, None]], 1)


def same_sets(exact: Kept, stored: Kept) -> bool:
    """Whether every position keeps the same ids, in any order."""

    def sets(targets: Kept) -> np.ndarray:
        return np.sort(np.where(targets.kept, targets.ids, -1), axis=1)

    return bool(np.array_equal(sets(exact), sets(stored)))


def _normalized(logs: np.ndarray) -> np.ndarray:
    top = logs.max(-1, keepdims=True)
    return logs - (top + np.log(np.exp(logs - top).sum(-1, keepdims=True)))
