"""Divergences between teacher and student: the student's view and sparse targets come in, one value per position goes
out.

Shape letters: `M` target positions, `K` teacher top-k.

p is the teacher, q the student, both over the K+1 view of `cache_view`. All are f-divergences, so each is a LOWER BOUND
of the dense one, exact where the teacher's tail has the student's shape, and exact for a dense cache. WHAT THE
TRUNCATION LEAVES OUT is the shape of the tail: no draw can give it back, since none of these is linear in p. Measured
against the dense gradient with a flat teacher at K = 32, relative error: .24 for forward KL, .25 for skew forward KL,
.26 for TVD, .24 and .33 for JS of .1 and .5, .43 for skew reverse KL, .67 for reverse KL, which acts on single tail
tokens.

With the tail `renormalise` both distributions are those of a token known to be one of the kept: nothing then teaches
how much mass the tail should have. It is here to be compared with.

None of them looks at `t`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coldstill.trainer.targets import SparseTargets

from .cache_view import CacheView, ViewTail
from .protocol import StudentView


@dataclass(frozen=True, kw_only=True)
class ReverseKl:
    """`KL(q || p)`: mode-seeking; the loss of MiniLLM (arXiv 2306.08543) on the cache's own text."""

    tail: ViewTail = "bucket"

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`."""
        return CacheView.of(view, targets, tail=self.tail).reverse_kl()


@dataclass(frozen=True, kw_only=True)
class JensenShannon:
    """`beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`: GKD's generalised JSD (arXiv
    2306.13649, equation 1), beta in (0, 1).

    Divided by beta it tends to forward KL as beta falls to 0, divided by 1 - beta to reverse KL as beta rises to 1; it
    is not divided here, so its scale falls at both ends.
    """

    beta: float = 0.1
    tail: ViewTail = "bucket"

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`."""
        both = CacheView.of(view, targets, tail=self.tail)
        log_m = _log_mixture(self.beta, both.log_p, both.log_q)
        of_teacher = both.expect(both.log_p.exp(), both.log_p - log_m)
        return self.beta * of_teacher + (1 - self.beta) * both.expect(both.log_q.exp(), both.log_q - log_m)


@dataclass(frozen=True, kw_only=True)
class TotalVariation:
    """`1/2 sum |p - q|` (f-distill, arXiv 2307.15190): bounded by 1; its gradient has a jump where p = q."""

    tail: ViewTail = "bucket"

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`."""
        both = CacheView.of(view, targets, tail=self.tail)
        gap = (both.log_p.exp() - both.log_q.exp()).abs()
        return 0.5 * gap.masked_fill(~both.used, 0).sum(1)


@dataclass(frozen=True, kw_only=True)
class SkewForwardKl:
    """`KL(p || alpha p + (1 - alpha) q)`: DistiLLM's skew KL (arXiv 2402.03898), alpha in [0, 1)."""

    alpha: float = 0.1
    tail: ViewTail = "bucket"

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`."""
        both = CacheView.of(view, targets, tail=self.tail)
        return both.expect(both.log_p.exp(), both.log_p - _log_mixture(self.alpha, both.log_p, both.log_q))


@dataclass(frozen=True, kw_only=True)
class SkewReverseKl:
    """`KL(q || alpha q + (1 - alpha) p)`: DistiLLM's skew reverse KL (arXiv 2402.03898), alpha in [0, 1). The mixture
    is differentiated too."""

    alpha: float = 0.1
    tail: ViewTail = "bucket"

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`."""
        both = CacheView.of(view, targets, tail=self.tail)
        return both.expect(both.log_q.exp(), both.log_q - _log_mixture(self.alpha, both.log_q, both.log_p))


def _log_mixture(share: float, log_first: torch.Tensor, log_second: torch.Tensor) -> torch.Tensor:
    """`log(share first + (1 - share) second)`, from logs: probabilities would underflow."""
    if share == 0:
        return log_second
    return torch.logaddexp(log_first + math.log(share), log_second + math.log1p(-share))
