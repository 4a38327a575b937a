"""Adaptive KL: forward and reverse KL, weighted by where student and teacher differ.

Shape letters: `M` target positions, `K` teacher top-k.

AKL (arXiv 2404.02657). With the teacher's symbols in descending order, the HEAD holds those whose cumulative
probability does not exceed mu, and always the first:

    g_head = sum over the head of |p - q|,    g_tail likewise over the others,    both without a gradient
    loss   = (g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail)

The published code of TAID marks the head in ascending order and applies the mark to gaps in the order of the
vocabulary, which weights the last ids of the vocabulary, and it differentiates the weights. The code of AKL's authors
does neither.

WHAT THE TRUNCATION LEAVES OUT: the mass outside the kept ids is one bucket, counted as tail. The head is the dense one
where the kept ids hold more than mu. The tail's gap and both KLs are lower bounds of the dense ones, with the larger
error in the reverse KL (see `divergences.py`). The weight of the head is therefore an upper bound of the dense weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from .base import BucketTail, TeacherLoss

if TYPE_CHECKING:
    import torch

    from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs
    from coldstill.trainer.targets import SparseTargets

SMALLEST_GAP = 1.1754944e-38
"""The smallest normal float32: keeps 0 / 0 out where q = p, so that there is no gap and both divergences are 0."""


class AdaptiveKl(TeacherLoss):
    """Forward and reverse KL weighted by the gaps in head and tail; kept ids may be in any order."""

    title: ClassVar[str] = "adaptive KL"
    arxiv: ClassVar[str | None] = "2404.02657"

    name: Literal["adaptive_kl"] = Field("adaptive_kl", description="Forward and reverse KL by head and tail.")
    tail: BucketTail = Field(
        "auto", description="Tail outside the top K: bucket, its total mass, counted as part of the loss's own tail."
    )
    mu: float = Field(0.5, gt=0, lt=1, description="The teacher's mass that is the head.")

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`; `t` is ignored."""
        both = student.buckets(targets)
        head = self._head(targets.logprobs.to(both.log_p.dtype).exp())
        gap = (both.log_p.exp() - both.log_q.detach().exp()).abs().masked_fill(~both.used, 0)
        share = (gap[:, :-1] * head).sum(1) / gap.sum(1).clamp_min(SMALLEST_GAP)
        return share * both.kl() + (1 - share) * both.reverse_kl()

    def _head(self, probs: torch.Tensor) -> torch.Tensor:
        """`bool [M, K]`: which of the kept ids of probability `probs [M, K]` are the head."""
        descending, order = probs.sort(dim=1, descending=True, stable=True)
        head = descending.cumsum(1) <= self.mu
        head[:, 0] = True
        return head.new_zeros(head.shape).scatter_(1, order, head)
