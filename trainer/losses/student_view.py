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

from coldstill.trainer.targets import SparseTargets

from .fastest_passes import fastest_passes
from .protocol import StudentView
from .row_passes import Readings, RowGradient, RowPasses

LOG_EMPTY_TAIL = -60.0
"""The student's log tail mass where the kept ids are the whole vocabulary: e^-60 is zero, and 0 * -60 is finite."""


@dataclass(frozen=True, kw_only=True)
class SeenLogits:
    """`view`, and what its gradient needs: `memory [M, V]`, as the passes left it, and what they read."""

    view: StudentView
    memory: torch.Tensor
    readings: Readings
    passes: RowPasses

    def gradient_(self, by_view: StudentView, targets: SparseTargets) -> torch.Tensor:
        """Gradient `[M, V]` by the logits, given that by each value of the view; in the memory of the logits."""
        kept, drawn = targets.kept, targets.draw_weights > 0
        by_kept, by_draws = by_view.log_q * kept, by_view.log_q_draws * drawn
        # With a tail its largest term is exp(0), so the sum is at least 1. Without one its log mass is a constant.
        by_tail = by_view.log_q_tail * (self.readings.tail_sum > 0)
        total = by_kept.sum(1) + by_draws.sum(1) + by_tail + by_view.log_q_label
        gradient = RowGradient(
            of_tail=(by_tail - total * self.view.log_q_tail.exp()) / self.readings.tail_sum.clamp_min(1),
            at_kept=by_kept - total[:, None] * self.view.log_q.exp() * kept,
            at_draws=by_draws,
            at_label=by_view.log_q_label,
        )
        return self.passes.write_(self.memory, targets, self.readings, gradient)


def see_(logits: torch.Tensor, targets: SparseTargets, *, passes: RowPasses | None = None) -> SeenLogits:
    """Look at `logits [M, V]`, float32 or float64, and overwrite them; `passes`: the fastest there are."""
    passes = fastest_passes(logits) if passes is None else passes
    read = passes.read_(logits, targets)
    kept, drawn = targets.kept, targets.draw_weights > 0
    lse_tail = read.tail_max + read.tail_sum.log()
    lse = torch.logaddexp(lse_tail, read.of_kept.masked_fill(~kept, -torch.inf).logsumexp(1))
    view = StudentView(
        # Unused entries stay finite: 0 * -inf is not a number.
        log_q=(read.of_kept - lse[:, None]).masked_fill(~kept, 0),
        log_q_tail=torch.where(read.tail_sum == 0, LOG_EMPTY_TAIL, lse_tail - lse),
        log_q_draws=(read.of_draws - lse[:, None]).masked_fill(~drawn, 0),
        log_q_label=read.of_label - lse,
    )
    return SeenLogits(view=view, memory=logits, readings=read, passes=passes)
