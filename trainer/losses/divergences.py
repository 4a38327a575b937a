"""f-divergences between teacher and student over the kept ids and one tail bucket.

Shape letters: `M` target positions, `K` teacher top-k.

p is the teacher, q the student, both over the K+1 `Buckets`. Each divergence is a LOWER BOUND of the dense one, exact
where the teacher's tail has the student's shape, and exact for a dense cache.

WHAT THE TRUNCATION LEAVES OUT is the shape of the tail. Draws cannot restore it, since none of these losses is linear
in p; the tail `forward_kl` of `ReverseKl` learns it by another loss. Relative error of the gradient against the dense
one, flat teacher, K = 32: forward KL .24, skew forward KL .25, TVD .26, JS of beta .1 and .5 .24 and .33, skew reverse
KL .43, reverse KL, which acts on single tail tokens, .67.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from .base import BucketTail, TeacherLoss
from .taid import tail_term

if TYPE_CHECKING:
    import torch

    from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs
    from coldstill.trainer.targets import SparseTargets

_TAIL = "Tail outside the top K: bucket, its total mass; the loss is then a lower bound of the dense one."


class ReverseKl(TeacherLoss):
    """`KL(q || p)`: mode-seeking; the loss of MiniLLM (arXiv 2306.08543) on the cache's own text.

    THE TAIL. The dense loss is that of the buckets plus `m_q KL(q' || p')`, of the two tails' shapes. The second part
    is a mean over the student's ids, and the draws are the teacher's. With `r = q' / p'` at them, `r log r - r + 1` is
    an unbiased estimate. But r is unbounded, and where the student's tail has left the draws, r and the gradient are 0.

    `tail: forward_kl` puts `m_q KL(p' || q')` in its place, with m_q fixed: the draws alone estimate it, and q = p
    stays the point of rest. The draws hold the tail's shape, and pull a student back whose mass is on one id of the
    tail. Its value has the entropy of p' in it, and is no divergence.

    Free logits, 512 ids, K = 8, 64 new draws at each of 400 steps, a flat and a sharp teacher; the dense reverse KL
    that is left, from the teacher's logits with noise of 1, from random logits, and from one id of the tail:

        dense        .000  .010   5.6        .000  .014  13.4
        bucket       .266  2.46   5.6        .026  .663  13.4
        forward_kl   .026  .090   .13        .004  .176   .97
        r log r      .566  .451   5.6        .001  .226  13.4
        r up to 4    .006  .101   5.6        .001  .114  13.4

    A student that learns the few draws of 128 positions by heart ends worse with them than with the bucket (1.02, not
    .37, flat teacher), as it does under the loss `forward_kl` (1.00). On a real model the KL to the teacher ended at
    1.77 with the draws and 2.86 with the bucket, the reverse KL at 1.84 and 2.22 (docs/real_pair.md).
    """

    title: ClassVar[str] = "reverse KL to the teacher, as in MiniLLM"
    arxiv: ClassVar[str | None] = "2306.08543"

    name: Literal["reverse_kl"] = Field("reverse_kl", description="KL(student || teacher).")
    tail: Literal["auto", "bucket", "forward_kl"] = Field(
        "auto",
        description="Tail outside the top K: bucket, its total mass, which auto is too; forward_kl also learns the "
        "tail's shape from the draws, by a forward KL within the tail.",
    )

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`."""
        both = student.buckets(targets)
        value = both.reverse_kl()
        if self.tail != "forward_kl":
            return value
        return value + tail_term(student, targets, both.log_q[:, -1].detach().exp())


class JensenShannon(TeacherLoss):
    """`beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`: GKD's generalized JSD (arXiv
    2306.13649, equation 1).

    Divided by beta it tends to forward KL as beta falls to 0, divided by 1 - beta to reverse KL as beta rises to 1. It
    is not divided here, so its scale falls at both ends.
    """

    title: ClassVar[str] = "generalized Jensen-Shannon divergence of GKD"
    arxiv: ClassVar[str | None] = "2306.13649"

    name: Literal["js"] = Field("js", description="Generalized Jensen-Shannon divergence of GKD.")
    tail: BucketTail = Field("auto", description=_TAIL)
    beta: float = Field(0.1, gt=0, lt=1, description="The teacher's share in the mixture.")

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`."""
        both = student.buckets(targets)
        log_m = _log_mixture(self.beta, both.log_p, both.log_q)
        of_teacher = both.expect(both.log_p.exp(), both.log_p - log_m)
        return self.beta * of_teacher + (1 - self.beta) * both.expect(both.log_q.exp(), both.log_q - log_m)


class TotalVariation(TeacherLoss):
    """`1/2 sum |p - q|` (f-DISTILL, arXiv 2307.15190): at most 1; its gradient jumps where p = q."""

    title: ClassVar[str] = "total variation distance, as in f-DISTILL"
    arxiv: ClassVar[str | None] = "2307.15190"

    name: Literal["tvd"] = Field("tvd", description="Total variation distance.")
    tail: BucketTail = Field("auto", description=_TAIL)

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`."""
        both = student.buckets(targets)
        gap = (both.log_p.exp() - both.log_q.exp()).abs()
        return 0.5 * gap.masked_fill(~both.used, 0).sum(1)


class SkewForwardKl(TeacherLoss):
    """`KL(p || alpha p + (1 - alpha) q)`: DistiLLM's skew KL (arXiv 2402.03898)."""

    title: ClassVar[str] = "skew forward KL of DistiLLM"
    arxiv: ClassVar[str | None] = "2402.03898"

    name: Literal["skew_forward_kl"] = Field("skew_forward_kl", description="Skew KL of DistiLLM.")
    tail: BucketTail = Field("auto", description=_TAIL)
    alpha: float = Field(0.1, ge=0, lt=1, description="Share of the teacher in the mixture.")

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`."""
        both = student.buckets(targets)
        return both.expect(both.log_p.exp(), both.log_p - _log_mixture(self.alpha, both.log_p, both.log_q))


class SkewReverseKl(TeacherLoss):
    """`KL(q || alpha q + (1 - alpha) p)`: DistiLLM's skew reverse KL (arXiv 2402.03898). The gradient passes through
    the mixture too."""

    title: ClassVar[str] = "skew reverse KL of DistiLLM"
    arxiv: ClassVar[str | None] = "2402.03898"

    name: Literal["skew_reverse_kl"] = Field("skew_reverse_kl", description="Skew reverse KL of DistiLLM.")
    tail: BucketTail = Field("auto", description=_TAIL)
    alpha: float = Field(0.1, ge=0, lt=1, description="Share of the student in the mixture.")

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`."""
        both = student.buckets(targets)
        return both.expect(both.log_q.exp(), both.log_q - _log_mixture(self.alpha, both.log_q, both.log_p))


def _log_mixture(share: float, log_first: torch.Tensor, log_second: torch.Tensor) -> torch.Tensor:
    """`log(share first + (1 - share) second)`, from logs: probabilities would underflow."""
    if share == 0:
        return log_second
    return (log_first + math.log(share)).logaddexp(log_second + math.log1p(-share))
