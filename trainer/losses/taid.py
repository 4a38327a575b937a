"""TAID from a cache: the student's view and sparse targets come in, one value per position goes out.

Shape letters: `M` target positions, `K` teacher top-k, `N` padded draws.

TAID (arXiv 2501.16937): `p_t = softmax((1 - t) sg(z_student) + t z_teacher)`, loss `KL(p_t || q)`, gradient
`q - p_t`. Logits are mixed, never probabilities: that would be forward KL times t, whatever t.

Of the teacher the cache knows log-probs `l_v` on the kept ids S, the mass `m_p` outside S, and some iid draws from
there. With `m_q` the student's mass outside S, and everything but `q` held fixed:

    a_v = (1 - t) log q_v + t l_v   (v in S),    a_T = (1 - t) log m_q + t log m_p,    P = softmax([a_S, a_T])
    target on S:       P_v
    target on the tail: P_T [ (1 - t W) q_v / m_q + t (weight of v among the draws) ]    W: the sum of the weights

Without draws (W = 0) this is the K+1 bucket: TAID against a teacher whose tail has the student's shape. With them (W =
1), at t = 1, its expectation over the draws is the teacher itself, given that there is a draw. At t < 1 two gaps to
dense TAID are left, both none where the tails' shapes agree: inside the tail the mix is arithmetic, not geometric, and
the tail's mass is the largest that the cache allows (`mass_corrected` estimates the right one).

THE VALUE is `KL(P || q)` over the K+1 view, plus the cross-entropy of the draws within the tail,
`t P_T sum(weight * (log m_q - log q_draw))`. It differs from the KL of the whole target by entropies of the target,
which are constants of the step: they are not needed for the gradient, and the entropy of a few draws says nothing about
the teacher. THE GRADIENT is that of this value with P fixed, and equals `q - target` exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from coldstill.trainer.targets import SparseTargets

from .cache_view import CacheView
from .protocol import SparseLoss, StudentView


@dataclass(frozen=True)
class Taid:
    """TAID with the `mixture` tail, or with the `bucket` alone, which leaves the draws aside."""

    tail: Literal["mixture", "bucket"] = "mixture"

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value `[M]` at `t`; what it leaves out of the dense TAID is in the head of this file."""
        both = CacheView.of(view, targets)
        log_target = both.log_softmax(interpolated(both, t))
        value = both.expect(log_target.exp(), log_target - both.log_q)
        if self.tail == "bucket":
            return value
        return value + pull_of_draws(view, targets, t * log_target[:, -1].exp())


@dataclass(frozen=True)
class ForwardKl:
    """`KL(teacher || student)` as far as the cache knows it: TAID held at t = 1.

    Exact on the kept ids and on the tail's total mass. The tail's shape comes from the draws in expectation, and is
    left free by `bucket`, whose value is a lower bound of the dense KL.
    """

    tail: Literal["mixture", "bucket"] = "mixture"

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 1.0) -> torch.Tensor:
        """Value `[M]`; `t` is not looked at."""
        return Taid(self.tail)(view, targets, t=1.0)


@dataclass(frozen=True)
class AtTeacher:
    """A loss of the kind of TAID held at t = 1: its forward KL."""

    loss: SparseLoss

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 1.0) -> torch.Tensor:
        """Value `[M]`; `t` is not looked at."""
        return self.loss(view, targets, t=1.0)


def interpolated(both: CacheView, t: float) -> torch.Tensor:
    """`a [M, K+1]`: logs of the target before it is normalised; the student's part has no gradient."""
    return torch.lerp(both.log_q.detach(), both.log_p, t)


def pull_of_draws(view: StudentView, targets: SparseTargets, mass: torch.Tensor) -> torch.Tensor:
    """Cross-entropy `[M]` within the tail of draws that together hold `mass [M]`, as far as their weights sum to 1."""
    weights = mass[:, None] * targets.draw_weights
    return (weights * (view.log_q_tail[:, None] - view.log_q_draws)).sum(1)
