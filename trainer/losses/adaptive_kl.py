"""Adaptive KL: the student's view and sparse targets come in, one value per position goes out.

Shape letters: `M` target positions, `K` teacher top-k.

AKL (arXiv 2404.02657) weighs forward and reverse KL by where the student is wrong. With the teacher's symbols in
descending order, the HEAD is those whose cumulative probability does not exceed mu, and always the first:

    g_head = sum over the head of |p - q|,    g_tail likewise over the others,    both without a gradient
    loss   = (g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail)

The published code of TAID marks the head in ascending order and applies the mark to gaps in the order of the
vocabulary, so that it weighs the last ids of the vocabulary; and it differentiates the weights. The authors' own code
does neither.

WHAT THE TRUNCATION LEAVES OUT: the mass outside the kept ids is one symbol, counted as tail. The head is the dense one
where the kept ids hold more than mu; the tail's gap and both KLs are lower bounds of the dense ones, the reverse KL
being the worse (see `divergences`). So the cache leans towards the head: its weight is an upper bound of the dense one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coldstill.trainer.targets import SparseTargets

from .cache_view import CacheView
from .protocol import StudentView


@dataclass(frozen=True, kw_only=True)
class AdaptiveKl:
    """Forward and reverse KL weighed by the gaps in head and tail; `mu` in (0, 1) is the head's mass. Kept ids may come
    in any order: they are sorted here, by the teacher's probability."""

    mu: float = 0.5

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`; `t` is not looked at."""
        both = CacheView.of(view, targets)
        with torch.no_grad():
            head = self._head(targets.logprobs.to(both.log_p.dtype).exp())
            gap = (both.log_p.exp() - both.log_q.exp()).abs().masked_fill(~both.used, 0)
            whole = gap.sum(1)
            # Where q = p there is no gap, and both divergences are 0.
            share = (gap[:, :-1] * head).sum(1) / whole.clamp_min(torch.finfo(whole.dtype).tiny)
        return share * both.kl() + (1 - share) * both.reverse_kl()

    def _head(self, probs: torch.Tensor) -> torch.Tensor:
        """`bool [M, K]`: which of the kept ids of probability `probs [M, K]` are the head."""
        descending, order = probs.sort(dim=1, descending=True, stable=True)
        head = descending.cumsum(1) <= self.mu
        head[:, 0] = True
        return torch.zeros_like(head).scatter_(1, order, head)
