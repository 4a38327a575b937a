"""Targets of a teacher that is known whole, cut down by the plainest code, and what a loss makes of them.

Shape letters: `M` target positions, `V` vocabulary, `K` teacher top-k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from coldstill.trainer.loss_kernels.fused_head import LossValues, Objective, SparseLoss, loss_on_logits
from coldstill.trainer.targets import SparseTargets
from tests import reference

TIMES = (0.0, 0.1, 0.4, 0.7, 1.0)


def cut(
    teacher: np.ndarray,
    *,
    top_k: int,
    draws: Sequence[Sequence[int]] | None = None,
    weights: Sequence[Sequence[float]] | None = None,
    labels: Sequence[int] | None = None,
    pads: int = 0,
) -> SparseTargets:
    """Float64 targets of dense teacher log-probs `[M, V]`, the kept ids ascending; `pads` unused entries at the end.
    Draws weigh the same each, unless `weights` says what of the tail they stand for."""
    count, vocabulary = teacher.shape
    ids = np.sort(np.argsort(-teacher, axis=1)[:, :top_k], axis=1)
    kept = np.take_along_axis(teacher, ids, 1)
    tails = [np.delete(teacher[m], ids[m]) for m in range(count)]
    ids = np.concatenate([ids, np.repeat(ids[:, :1], pads, 1)], 1)
    kept = np.concatenate([kept, np.full((count, pads), -np.inf)], 1)
    draws = draws if draws is not None else [[]] * count
    weights = weights if weights is not None else [[1 / len(drawn) for _ in drawn] for drawn in draws]
    labels = np.array(labels if labels is not None else np.arange(count) % vocabulary)
    width = max(len(drawn) for drawn in draws)
    padded = np.array([[*drawn, *[0] * (width - len(drawn))] for drawn in draws], np.int64).reshape(count, width)
    shares = np.array([[*some, *[0.0] * (width - len(some))] for some in weights]).reshape(count, width)
    return SparseTargets(
        ids=torch.from_numpy(ids),
        logprobs=torch.from_numpy(kept),
        log_tail=torch.from_numpy(np.array([math.log(np.exp(tail).sum()) if tail.size else -60.0 for tail in tails])),
        labels=torch.from_numpy(labels),
        label_logprob=torch.from_numpy(teacher[np.arange(count), labels]),
        draws=torch.from_numpy(padded),
        draw_weights=torch.from_numpy(shares),
        draw_logprobs=torch.from_numpy(np.where(shares > 0, np.take_along_axis(teacher, padded, 1), -60.0)),
        row=torch.zeros(count, dtype=torch.int64),
        position=torch.arange(count),
    )


class Known(NamedTuple):
    """What the cache says of one position, for the reference."""

    ids: list[int]
    logprobs: list[float]
    log_tail: float


def known(targets: SparseTargets, m: int) -> Known:
    """Position `m`, without its pads."""
    used = targets.logprobs[m] > -torch.inf
    return Known(targets.ids[m][used].tolist(), targets.logprobs[m][used].tolist(), targets.log_tail[m].item())


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """`[M, V]` log-probs of `[M, V]` scores."""
    return np.log(np.stack([reference.softmax(row) for row in scores]))


def value_and_gradient(
    loss: SparseLoss | Objective, logits: np.ndarray, targets: SparseTargets, t: float = 1.0
) -> tuple[LossValues, np.ndarray]:
    """Values of `logits [M, V]` and the gradient of their sum by the logits."""
    leaf = torch.tensor(logits, requires_grad=True)
    objective = loss if isinstance(loss, Objective) else Objective(loss)
    total, values = loss_on_logits(leaf, targets, objective, t=t)
    total.backward()
    assert leaf.grad is not None
    return values, leaf.grad.numpy()


class Outcomes(NamedTuple):
    """Every outcome of some draws at one position: its chance `[R]`, how many fell into the tail `[R]`, and the target
    `[R, V]` that a loss makes of it."""

    chances: np.ndarray
    drawn: np.ndarray
    targets: np.ndarray


def outcomes(
    loss: SparseLoss, student: np.ndarray, teacher: np.ndarray, *, top_k: int, count: int, t: float
) -> Outcomes:
    """All draws of `count` from `teacher [V]` log-probs, learned by `student [V]`."""
    ids = cut(teacher[None], top_k=top_k).ids[0].tolist()
    chances, draws = zip(*reference.all_draws(np.exp(teacher), ids, count), strict=True)
    every = len(chances)
    targets = cut(np.repeat(teacher[None], every, 0), top_k=top_k, draws=draws)
    _, gradient = value_and_gradient(loss, np.repeat(student[None], every, 0), targets, t)
    return Outcomes(np.array(chances), np.array([len(some) for some in draws]), reference.softmax(student) - gradient)


class Scene(NamedTuple):
    """Student logits and teacher log-probs `[6, 20]`, and tail draws outside the top 7: none, one, many, repeats."""

    student: np.ndarray
    teacher: np.ndarray
    draws: list[list[int]]


def scene() -> Scene:
    """The same one each time."""
    random = np.random.default_rng(3)
    teacher = log_softmax(2 * random.standard_normal((6, 20)))
    outside = [np.argsort(-row)[7:] for row in teacher]
    ranks = [[], [3], [0, 0, 5], [1, 2, 3, 4], [6, 6, 6, 6, 6], []]
    draws = [[int(rest[rank]) for rank in some] for rest, some in zip(outside, ranks, strict=True)]
    return Scene(2 * random.standard_normal((6, 20)), teacher, draws)
