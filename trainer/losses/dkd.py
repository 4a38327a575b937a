"""Decoupled knowledge distillation: KL split at the label into two parts with free weights.

Shape letters: `M` target positions, `K` teacher top-k.

DKD (arXiv 2203.08679) splits `KL(p || q)` at the label y:

    TCKD = KL of (p_y, 1 - p_y) from (q_y, 1 - q_y)
    NCKD = KL of p from q, both given that the token is not y
    loss = alpha TCKD + beta NCKD          (forward KL is TCKD + (1 - p_y) NCKD)

at temperature 1, the only one that a cache holds. A label among the kept ids leaves K other symbols, one of them the
tail bucket. A label outside them is taken out of the tail with its own log-prob, which every cache holds, and leaves
K + 1.

WHAT THE TRUNCATION LEAVES OUT: TCKD is exact for every label. NCKD takes the tail (without the label) as one bucket: a
lower bound, exact where the teacher's tail has the student's shape.

The published code of TAID divides by all positions, padding included. Values here are per target position, so padding
cannot enter the mean.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from .base import BucketTail, TeacherLoss

if TYPE_CHECKING:
    import torch

    from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs
    from coldstill.trainer.targets import SparseTargets

LEAST_SHARE_LEFT = 1e-5
"""Smallest share of a tail that is left without its label: rounding in the cache can leave nothing or less, and in
float32 1 minus the share has lost all its digits two powers of ten further down."""

LEAST_LABEL_LOGPROB = -60.0
"""A label that the teacher excludes has the log-prob -inf: e^-60 is as good as 0, and 0 * -inf is not a number."""


class Dkd(TeacherLoss):
    """`alpha TCKD + beta NCKD`."""

    title: ClassVar[str] = "decoupled knowledge distillation"
    arxiv: ClassVar[str | None] = "2203.08679"

    name: Literal["dkd"] = Field("dkd", description="Decoupled knowledge distillation.")
    tail: BucketTail = Field("auto", description="Tail outside the top K: bucket, its total mass, less the label's.")
    alpha: float = Field(1.0, ge=0, le=100, description="Weight of the label's part.")
    beta: float = Field(0.5, ge=0, le=100, description="Weight of the other ids' part.")

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`; `t` is ignored."""
        both = student.buckets(targets)
        label_p = targets.label_logprob.to(both.log_p.dtype).clamp_min(LEAST_LABEL_LOGPROB)
        label_q = student.log_q_label
        is_label = (targets.ids == targets.labels[:, None]) & targets.kept
        in_tail = ~is_label.any(1)
        used = both.used.clone()
        used[:, :-1] &= ~is_label
        # All symbols but the label; their masses do not sum to 1.
        rest = dataclasses.replace(
            both.with_tail(
                log_q=_tail_without(both.log_q[:, -1], label_q, in_tail),
                log_p=_tail_without(both.log_p[:, -1], label_p, in_tail),
            ),
            used=used,
        )
        of_label = _binary_kl(label_p, rest.log_total(rest.log_p), label_q, rest.log_total(rest.log_q))
        return self.alpha * of_label + self.beta * rest.among(used).kl()


def _binary_kl(
    log_p: torch.Tensor, log_p_rest: torch.Tensor, log_q: torch.Tensor, log_q_rest: torch.Tensor
) -> torch.Tensor:
    """`KL [M]` between two outcomes; the second mass is summed, never 1 minus the first: that loses all digits."""
    (label_p, rest_p), (label_q, rest_q) = _normalized(log_p, log_p_rest), _normalized(log_q, log_q_rest)
    return label_p.exp() * (label_p - label_q) + rest_p.exp() * (rest_p - rest_q)


def _normalized(log_first: torch.Tensor, log_second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = log_first.logaddexp(log_second)
    return log_first - total, log_second - total


def _tail_without(log_tail: torch.Tensor, log_label: torch.Tensor, in_tail: torch.Tensor) -> torch.Tensor:
    """`log_tail [M]` without the label's mass where `in_tail bool [M]`."""
    share = (log_label - log_tail).clamp_max(math.log1p(-LEAST_SHARE_LEFT))
    # Filled before the logarithm: if the label is not in the tail, its share of it is not below 1.
    left = (-share.masked_fill(~in_tail, -1.0).exp()).log1p()
    return log_tail + left.masked_fill(~in_tail, 0)
