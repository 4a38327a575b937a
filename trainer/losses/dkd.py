"""Decoupled knowledge distillation: the student's view and sparse targets come in, one value per position goes out.

Shape letters: `M` target positions, `K` teacher top-k.

DKD (arXiv 2203.08679) splits `KL(p || q)` at the label y and weighs the parts freely:

    TCKD = KL of (p_y, 1 - p_y) from (q_y, 1 - q_y)
    NCKD = KL of p from q, both given that the token is not y
    loss = alpha TCKD + beta NCKD          (forward KL is TCKD + (1 - p_y) NCKD)

at temperature 1, the only one that a cache holds. A label among the kept ids leaves K other symbols, the tail being
one. A label outside them is taken out of the tail, with its own log-prob, which every cache holds: K + 1 others.

WHAT THE TRUNCATION LEAVES OUT: TCKD is exact, wherever the label is. NCKD takes the tail (less the label) as one
symbol: a lower bound, exact where the teacher's tail has the student's shape.

The published code of TAID divides by all positions, padding included. Values here are per target position, so nothing
that is not a target can enter the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coldstill.trainer.targets import SparseTargets

from .cache_view import CacheView
from .protocol import StudentView

LEAST_SHARE_LEFT = 1e-5
"""What is left of a tail that its label fills, as a share: rounding in the cache can leave nothing or less, and 1 minus
the share has lost all its digits in float32 two powers of ten further down."""


@dataclass(frozen=True, kw_only=True)
class Dkd:
    """`alpha TCKD + beta NCKD`."""

    alpha: float = 1.0
    beta: float = 0.5

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`; `t` is not looked at."""
        both = CacheView.of(view, targets)
        label_p = targets.label_logprob.to(both.log_p.dtype)
        label_q = view.log_q_label
        is_label = (targets.ids == targets.labels[:, None]) & targets.kept
        in_tail = ~is_label.any(1)
        others = CacheView(
            log_q=_tail_without(both.log_q, label_q, in_tail),
            log_p=_tail_without(both.log_p, label_p, in_tail),
            used=both.used & ~torch.nn.functional.pad(is_label, (0, 1), value=False),
        )
        target = _binary(label_p, others.log_p.masked_fill(~others.used, -torch.inf).logsumexp(1))
        student = _binary(label_q, others.log_q.masked_fill(~others.used, -torch.inf).logsumexp(1))
        of_label = (target.exp() * (target - student)).sum(1)
        return self.alpha * of_label + self.beta * others.among(others.used).kl()


def _binary(log_first: torch.Tensor, log_second: torch.Tensor) -> torch.Tensor:
    """`[M, 2]` log-probs of two outcomes; the second mass is summed, never 1 minus the first: that loses all digits."""
    return torch.stack([log_first, log_second], 1).log_softmax(1)


def _tail_without(log_probs: torch.Tensor, log_label: torch.Tensor, in_tail: torch.Tensor) -> torch.Tensor:
    """`[M, K+1]` with the label's mass taken out of the last symbol where `in_tail bool [M]`."""
    share = (log_label - log_probs[:, -1]).clamp_max(math.log1p(-LEAST_SHARE_LEFT))
    # Filled before the logarithm: where the label is not in the tail, its share of it is not below 1.
    left = torch.log1p(-share.masked_fill(~in_tail, -1.0).exp())
    tail = log_probs[:, -1] + left.masked_fill(~in_tail, 0)
    return torch.cat([log_probs[:, :-1], tail[:, None]], 1)
