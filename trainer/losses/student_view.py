"""One look at the student's logits: `[M, V]` logits come in, a `StudentView` goes out; its gradient comes in, the
gradient by the logits goes out. All in the memory of the logits.

Shape letters: `M` target positions, `V` vocabulary, `K` teacher top-k, `N` padded draws.

With S the kept ids of a position, T all others, and u the gradient of its loss by each value of the view:

    dLoss/dz_v = 1[v in S] u_v + 1[v in T] (q_v / m_q) u_T + 1[v a draw] u_draw + 1[v the label] u_label - q_v U

with U the sum of all u: every loss of a cache is one scalar per position times the student's own tail, and a few
single entries. So a loss costs what cross-entropy costs, whichever it is; plain autograd through `[M, V]` costs four
times as much.

Numerics: the student's tail is summed on its own, shifted by its own maximum, never as 1 - sum: exact however small,
and no mass is lost to underflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.targets import SparseTargets

from .protocol import StudentView

LOG_EMPTY_TAIL = -60.0
"""The student's log tail mass where the kept ids are the whole vocabulary: e^-60 is zero, and 0 * -60 is finite."""


@dataclass(frozen=True, kw_only=True)
class SeenLogits:
    """`view`, and what its gradient needs: `exps [M, V]`, exp of the tail's logits above their maximum and 0 at the
    kept ids, and its sums `tail_sum [M]`."""

    view: StudentView
    exps: torch.Tensor
    tail_sum: torch.Tensor

    def gradient_(self, by_view: StudentView, targets: SparseTargets) -> torch.Tensor:
        """Gradient `[M, V]` by the logits, given that by each value of the view; in the memory of `exps`."""
        kept, drawn = targets.kept, targets.draw_weights > 0
        by_kept, by_draws = by_view.log_q * kept, by_view.log_q_draws * drawn
        total = by_kept.sum(1) + by_draws.sum(1) + by_view.log_q_tail + by_view.log_q_label
        # With a tail its largest term is exp(0), so the sum is at least 1; without one `exps` is all zero.
        of_tail = (by_view.log_q_tail - total * self.view.log_q_tail.exp()) / self.tail_sum.clamp_min(1)
        gradient = self.exps.mul_(of_tail[:, None])
        gradient.scatter_add_(1, targets.ids, by_kept - total[:, None] * self.view.log_q.exp() * kept)
        gradient.scatter_add_(1, targets.draws, by_draws)
        return gradient.scatter_add_(1, targets.labels[:, None], by_view.log_q_label[:, None])


def see_(logits: torch.Tensor, targets: SparseTargets) -> SeenLogits:
    """Look at `logits [M, V]`, float32 or float64, and overwrite them."""
    kept, drawn = targets.kept, targets.draw_weights > 0
    of_kept = logits.gather(1, targets.ids)
    of_draws = logits.gather(1, targets.draws)
    of_label = logits.gather(1, targets.labels[:, None])[:, 0]

    logits.scatter_(1, targets.ids, -torch.inf)
    shift = logits.amax(1, keepdim=True)
    shift.masked_fill_(shift == -torch.inf, 0)
    exps = logits.sub_(shift).exp_()
    tail_sum = exps.sum(1)
    lse_tail = shift[:, 0] + tail_sum.log()
    lse = torch.logaddexp(lse_tail, of_kept.masked_fill(~kept, -torch.inf).logsumexp(1))
    view = StudentView(
        # Unused entries stay finite: 0 * -inf is not a number.
        log_q=(of_kept - lse[:, None]).masked_fill(~kept, 0),
        log_q_tail=torch.where(tail_sum > 0, lse_tail - lse, LOG_EMPTY_TAIL),
        log_q_draws=(of_draws - lse[:, None]).masked_fill(~drawn, 0),
        log_q_label=of_label - lse,
    )
    return SeenLogits(view=view, exps=exps, tail_sum=tail_sum)
