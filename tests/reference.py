"""Slow, obvious float64 twins of the trainer's formulas, one position at a time. Imports nothing of ours.

Everything is a plain numpy vector over the whole vocabulary `V`; gradients are of a cross-entropy with a fixed target,
`q - target`, and nothing else.
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


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """`KL(p || q)` in nats; `0 log 0 = 0`."""
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))


def dense_taid_target(student_logits: np.ndarray, teacher_logits: np.ndarray, t: float) -> np.ndarray:
    """arXiv 2501.16937: the softmax of the interpolated LOGITS."""
    return softmax((1 - t) * student_logits + t * teacher_logits)


def probability_mix_target(student_logits: np.ndarray, teacher_logits: np.ndarray, t: float) -> np.ndarray:
    """What TAID is not: the interpolated probabilities; the gradient is that of forward KL times t."""
    return (1 - t) * softmax(student_logits) + t * softmax(teacher_logits)


def sparse_target(
    student_logits: np.ndarray,
    ids: Sequence[int],
    logprobs: Sequence[float],
    log_tail: float,
    draws: Sequence[int],
    t: float,
    *,
    tail_ratio: float = 1.0,
) -> np.ndarray:
    """The target `[V]` of a position of which K log-probs, the tail's mass and some tail draws are known.

    The teacher's head is known; its tail, for the mass, is the student's tail scaled (and `tail_ratio` times that,
    before all is made to sum to 1); inside the tail the share t goes to the draws, if there are any.
    """
    q = softmax(student_logits)
    tail = [v for v in range(q.size) if v not in set(ids)]
    student_tail = sum(q[v] for v in tail)
    weights = np.zeros(q.size)
    for token, logprob in zip(ids, logprobs, strict=True):
        weights[token] = q[token] ** (1 - t) * math.exp(logprob) ** t
    tail_weight = tail_ratio * student_tail ** (1 - t) * math.exp(log_tail) ** t if tail else 0.0
    total = weights.sum() + tail_weight
    target = weights / total
    for v in tail:
        shape = q[v] / student_tail
        if len(draws):
            shape = (1 - t) * shape + t * list(draws).count(v) / len(draws)
        target[v] = tail_weight / total * shape
    return target


def student_shaped_teacher(
    student_logits: np.ndarray,
    ids: Sequence[int],
    logprobs: Sequence[float],
    log_tail: float,
    *,
    apart: tuple[int, float] | None = None,
) -> np.ndarray:
    """The teacher `[V]` that the cache cannot tell from the real one and that is nearest to the student: its tail has
    the student's shape. `apart`: an id of the tail whose own log-prob is known too."""
    q = softmax(student_logits)
    p = np.zeros(q.size)
    known = dict(zip(ids, logprobs, strict=True))
    if apart is not None and apart[0] not in known:
        known[apart[0]] = apart[1]
        log_tail = math.log(math.exp(log_tail) - math.exp(apart[1]))
    rest = [v for v in range(q.size) if v not in known]
    for v in known:
        p[v] = math.exp(known[v])
    for v in rest:
        p[v] = math.exp(log_tail) * q[v] / sum(q[v] for v in rest)
    return p


def js(p: np.ndarray, q: np.ndarray, beta: float) -> float:
    """arXiv 2306.13649, equation 1: p weighs beta."""
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def tvd(p: np.ndarray, q: np.ndarray) -> float:
    """Half the L1 distance."""
    return 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True))


def skew_forward_kl(p: np.ndarray, q: np.ndarray, alpha: float) -> float:
    """arXiv 2402.03898: KL of p from a mixture with the share alpha of p."""
    return kl(p, alpha * p + (1 - alpha) * q)


def skew_reverse_kl(p: np.ndarray, q: np.ndarray, alpha: float) -> float:
    """arXiv 2402.03898: KL of q from a mixture with the share alpha of q."""
    return kl(q, alpha * q + (1 - alpha) * p)


def adaptive_kl_share(p: np.ndarray, q: np.ndarray, mu: float) -> float:
    """arXiv 2404.02657, as in its authors' code: the weight of forward KL."""
    head, mass = set(), 0.0
    for rank, v in enumerate(sorted(range(p.size), key=lambda v: -p[v])):
        mass += p[v]
        if rank == 0 or mass <= mu:
            head.add(v)
    gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
    return sum(gaps[v] for v in head) / sum(gaps)


def dkd(p: np.ndarray, q: np.ndarray, label: int, alpha: float, beta: float) -> float:
    """arXiv 2203.08679 at temperature 1: the label against the rest, and the rest among themselves."""
    others = [v for v in range(p.size) if v != label]
    of_label = kl(np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]]))
    of_others = kl(p[others] / p[others].sum(), q[others] / q[others].sum())
    return alpha * of_label + beta * of_others


def slope(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Gradient `[V]` of `function` by central differences; good to about 1e-9."""
    rises = []
    for unit in np.eye(at.size):
        rises.append((function(at + step * unit) - function(at - step * unit)) / (2 * step))
    return np.array(rises)


def gradient(student_logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """d/dlogits of `-sum target log softmax(logits)`, the target fixed."""
    return softmax(student_logits) - target


def sparse_value(
    student_logits: np.ndarray,
    ids: Sequence[int],
    logprobs: Sequence[float],
    log_tail: float,
    draws: Sequence[int],
    t: float,
    *,
    fixed_at: np.ndarray | None = None,
) -> float:
    """KL over the K+1 symbols, plus the draws' cross-entropy within the tail.

    The K+1 target is made from the student `fixed_at`, if given: then its slope is the gradient to be learned from.
    """
    target = sparse_target(student_logits if fixed_at is None else fixed_at, ids, logprobs, log_tail, (), t)
    q = softmax(student_logits)
    tail = [v for v in range(q.size) if v not in set(ids)]

    def view(p: np.ndarray) -> np.ndarray:
        return np.array([*(p[v] for v in ids), *([sum(p[v] for v in tail)] if tail else [])])

    value = kl(view(target), view(q))
    if len(draws):
        tail_target, tail_mass = view(target)[-1], view(q)[-1]
        value += t * tail_target * sum(math.log(tail_mass / q[v]) for v in draws) / len(draws)
    return value


def bucket_kl(student_logits: np.ndarray, ids: Sequence[int], logprobs: Sequence[float], log_tail: float) -> float:
    """KL(teacher || student) over the K ids and one symbol for the rest."""
    return sparse_value(student_logits, ids, logprobs, log_tail, (), 1.0)


def cross_entropy(student_logits: np.ndarray, label: int) -> float:
    """`-log q(label)`."""
    return -math.log(softmax(student_logits)[label])


def all_draws(teacher: np.ndarray, ids: Sequence[int], count: int) -> Iterator[tuple[float, list[int]]]:
    """Every outcome of `count` iid draws from `teacher [V]`: its probability, and the draws that fell outside `ids`."""
    for outcome in itertools.product(range(teacher.size), repeat=count):
        yield math.prod(teacher[v] for v in outcome), [v for v in outcome if v not in set(ids)]


def taid_course(
    losses: Sequence[float], *, t_start: float, t_end: float, alpha: float, beta: float, total_steps: int
) -> list[float]:
    """t after each step, by the update rule of the official code, once per optimizer step."""
    t, momentum, previous, course = t_start, 0.0, math.inf, []
    for step, loss in enumerate(losses, start=1):
        if math.isfinite(previous):
            momentum = beta * momentum + (1 - beta) * (previous - loss) / (previous + 1e-15)
            step_size = alpha / (1 + math.exp(-momentum)) * (1 - t)
            t = min(t_end, max(t_start + (t_end - t_start) * step / total_steps, t + step_size))
        previous = loss
        course.append(t)
    return course


def storage_kl(exact: object, stored: object) -> list[float]:
    """KL(exact || stored) of each position in nats, over the kept ids and the tail, by plain Python in float64."""
    values = []
    for n in range(len(exact.counts)):  # type: ignore[attr-defined]
        sides = []
        for targets in (exact, stored):
            count = int(targets.counts[n])  # type: ignore[attr-defined]
            logs = {int(targets.ids[n, k]): float(targets.logprobs[n, k]) for k in range(count)}  # type: ignore[attr-defined]
            logs[-1] = float(targets.log_tail[n])  # type: ignore[attr-defined]
            total = math.log(sum(math.exp(value) for value in logs.values()))
            sides.append({key: value - total for key, value in logs.items()})
        mine, theirs = sides
        values.append(sum(math.exp(value) * (value - theirs[key]) for key, value in mine.items() if value > -600))
    return values
