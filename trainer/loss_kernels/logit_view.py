"""The log-probs that a loss reads from the logits, and the logits' gradient.

Shape letters: `M` target positions, `V` vocabulary, `K` teacher top-k, `N` padded draws. All logs are natural.

`forward_` turns logits into `StudentLogProbs`, the input of every loss; `LogitView.backward_` turns the gradient with
respect to those into that with respect to the logits. Both work in the memory of the logits. With S the kept ids of a
position, T all other ids, q the student, m_q its mass in T, and u the gradient of the position's loss with respect to
each of its log-probs:

    dLoss/dz_v = 1[v in S] u_v + 1[v in T] (q_v / m_q) u_T + 1[v a draw] u_draw + 1[v the label] u_label - q_v U

where U is the sum of all u. The gradient of every cached loss is therefore one scalar per position times the student's
own tail, plus a few single entries, and every loss costs what cross-entropy costs. Autograd through `[M, V]` costs four
times as much.

Numerics: the student's tail is summed on its own, shifted by its own maximum, never computed as 1 - sum. It is exact at
any size, and no mass is lost to underflow.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass

import torch

from coldstill.common.errors import type_and_line
from coldstill.trainer.targets import SparseTargets

from .row_passes import LARGEST_DIFFERENCE, RowGradient, RowPasses, RowReadings, difference

LOG_EMPTY_TAIL = -60.0
"""Log mass of a tail without ids, when the kept ids are the whole vocabulary: e^-60 is zero, and 0 * -60 is finite."""

TRITON_SWITCH = "COLDSTILL_TRITON"
"""Environment variable; 0 turns the Triton passes off."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudentLogProbs:
    """Log-probs of the student's full softmax at the places that `SparseTargets` names; float32 or wider.

    `log_q [M, K]`: of the kept ids; unused entries are 0. `log_q_tail [M]`: of all mass outside the kept ids together,
    -60 if the kept ids are the whole vocabulary. `log_q_draws [M, N]`: of each draw; padding is 0.
    `log_q_label [M]`: of the token that follows in the text.
    """

    log_q: torch.Tensor
    log_q_tail: torch.Tensor
    log_q_draws: torch.Tensor
    log_q_label: torch.Tensor

    def leaves(self) -> StudentLogProbs:
        """The same values as leaves of a new autograd graph."""
        return StudentLogProbs(**{name: tensor.detach().requires_grad_() for name, tensor in vars(self).items()})

    def detach(self) -> StudentLogProbs:
        """The same values without a gradient."""
        return StudentLogProbs(**{name: tensor.detach() for name, tensor in vars(self).items()})

    def buckets(self, targets: SparseTargets) -> Buckets:
        """Student and teacher over K kept ids and one tail bucket, in the dtype of the student."""
        used = torch.nn.functional.pad(targets.kept, (0, 1), value=True)
        # A teacher's tail without mass is as empty as a student's.
        log_tail = targets.log_tail.clamp_min(LOG_EMPTY_TAIL)
        log_p = torch.cat([targets.logprobs, log_tail[:, None]], 1).to(self.log_q.dtype)
        log_q = torch.cat([self.log_q, self.log_q_tail[:, None]], 1)
        return Buckets(log_q=log_q, log_p=log_p.masked_fill(~used, 0), used=used)


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The K+1 view of a position: K kept ids and one bucket, the last, for all other ids.

    `log_q [M, K+1]` of the student, `log_p [M, K+1]` of the teacher, `used bool [M, K+1]`: entries that count. An
    unused entry is 0 in both, since 0 * -inf is not a number.

    An f-divergence over the buckets is a lower bound of the dense one (data processing inequality). It equals the dense
    one, value and gradient, for a teacher whose tail has the student's shape and the teacher's mass.
    """

    log_q: torch.Tensor
    log_p: torch.Tensor
    used: torch.Tensor

    def among(self, used: torch.Tensor) -> Buckets:
        """Both distributions, given that the token is one of `used bool [M, K+1]`, a subset of those used here."""
        return Buckets(
            log_q=self.log_q.masked_fill(~used, -torch.inf).log_softmax(1).masked_fill(~used, 0),
            log_p=self.log_p.masked_fill(~used, -torch.inf).log_softmax(1).masked_fill(~used, 0),
            used=used,
        )

    def with_tail(self, *, log_q: torch.Tensor, log_p: torch.Tensor) -> Buckets:
        """The same kept ids with other tails `log_q [M]` and `log_p [M]`; nothing is normalized again."""
        return Buckets(
            log_q=torch.cat([self.log_q[:, :-1], log_q[:, None]], 1),
            log_p=torch.cat([self.log_p[:, :-1], log_p[:, None]], 1),
            used=self.used,
        )

    def log_softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """`[M, K+1]` log-probs of `scores [M, K+1]` over the used entries; -inf elsewhere."""
        return scores.masked_fill(~self.used, -torch.inf).log_softmax(1)

    def log_total(self, log_probs: torch.Tensor) -> torch.Tensor:
        """`[M]` log of the summed mass of `log_probs [M, K+1]` over the used entries."""
        return log_probs.masked_fill(~self.used, -torch.inf).logsumexp(1)

    def expect(self, probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`[M]` sums of `probs * values` over the used entries."""
        return (probs * values).masked_fill(~self.used, 0).sum(1)

    def kl(self) -> torch.Tensor:
        """`KL(teacher || student) [M]` over the buckets: a lower bound of the dense KL."""
        return self.expect(self.log_p.exp(), self.log_p - self.log_q)

    def reverse_kl(self) -> torch.Tensor:
        """`KL(student || teacher) [M]` over the buckets."""
        return self.expect(self.log_q.exp(), self.log_q - self.log_p)


class PlainPasses:
    """In torch only, on any device, in float32 or float64; `read_` leaves the softmax over the tail, 0 at kept ids.

    torch's softmax works on a row while the row is in the cache. Its sum is one over its largest value, so besides it
    only the largest logit before and the largest value afterwards are read."""

    def read_(self, logits: torch.Tensor, targets: SparseTargets) -> RowReadings:
        """Read the logits."""
        of_kept = logits.gather(1, targets.ids)
        of_draws = logits.gather(1, targets.draws)
        of_label = logits.gather(1, targets.labels[:, None])[:, 0]
        logits.scatter_(1, targets.ids, -torch.inf)
        tail_max = logits.amax(1)
        has_tail = tail_max != -torch.inf
        tail_sum = torch.softmax(logits, 1, out=logits).amax(1).reciprocal()
        if not has_tail.all():
            logits[~has_tail] = 0
        lowest = torch.finfo(logits.dtype).min
        return RowReadings(
            of_kept=of_kept,
            of_draws=of_draws,
            of_label=of_label,
            tail_max=tail_max.where(has_tail, lowest),
            tail_sum=tail_sum.where(has_tail, 0),
        )

    def write_(
        self, logits: torch.Tensor, targets: SparseTargets, readings: RowReadings, gradient: RowGradient
    ) -> torch.Tensor:
        """Write the gradient."""
        logits.mul_((gradient.of_tail * readings.tail_sum)[:, None])
        logits.scatter_add_(1, targets.ids, gradient.at_kept)
        logits.scatter_add_(1, targets.draws, gradient.at_draws)
        return logits.scatter_add_(1, targets.labels[:, None], gradient.at_label[:, None])


def passes_for(logits: torch.Tensor) -> RowPasses:
    """Triton's passes for float32 logits on a GPU that computes them correctly, else the plain ones.

    The first call on a GPU compiles and checks, which takes seconds. Any failure (no Triton, no C compiler, an unknown
    GPU, a different result) is one warning in the log. `COLDSTILL_TRITON=0` in the environment skips Triton silently.
    """
    if logits.is_cuda and logits.dtype == torch.float32 and os.environ.get(TRITON_SWITCH, "1") != "0":
        return _checked_passes(logits.device)
    return PlainPasses()


@functools.cache
def _checked_passes(device: torch.device) -> RowPasses:
    try:
        from .triton_passes import TritonPasses

        passes = TritonPasses()
        if (found := difference(passes, PlainPasses(), device)) <= LARGEST_DIFFERENCE:
            return passes
        reason = f"they differ from the plain passes by {found:.1e}"
    except Exception as error:
        reason = type_and_line(error)
    log.warning("losses on %s run without Triton: %s (%s=0 turns it off silently)", device, reason, TRITON_SWITCH)
    return PlainPasses()


@dataclass(frozen=True, kw_only=True)
class LogitView:
    """`log_probs` of the student, and what the backward pass needs: `memory [M, V]` as `read_` left it."""

    log_probs: StudentLogProbs
    memory: torch.Tensor
    readings: RowReadings
    passes: RowPasses

    def backward_(self, by_log_probs: StudentLogProbs, targets: SparseTargets) -> torch.Tensor:
        """Gradient `[M, V]` with respect to the logits from that of each log-prob, written into the logits' memory."""
        kept, drawn = targets.kept, targets.draw_weights > 0
        by_kept, by_draws = by_log_probs.log_q * kept, by_log_probs.log_q_draws * drawn
        # With a tail its largest term is exp(0), so the sum is at least 1. Without one its log mass is a constant.
        by_tail = by_log_probs.log_q_tail * (self.readings.tail_sum > 0)
        total = by_kept.sum(1) + by_draws.sum(1) + by_tail + by_log_probs.log_q_label
        gradient = RowGradient(
            of_tail=(by_tail - total * self.log_probs.log_q_tail.exp()) / self.readings.tail_sum.clamp_min(1),
            at_kept=by_kept - total[:, None] * self.log_probs.log_q.exp() * kept,
            at_draws=by_draws,
            at_label=by_log_probs.log_q_label,
        )
        return self.passes.write_(self.memory, targets, self.readings, gradient)


def forward_(logits: torch.Tensor, targets: SparseTargets, *, passes: RowPasses | None = None) -> LogitView:
    """Read `logits [M, V]`, float32 or float64, and overwrite them; `passes` default to `passes_for(logits)`."""
    passes = passes_for(logits) if passes is None else passes
    read = passes.read_(logits, targets)
    kept, drawn = targets.kept, targets.draw_weights > 0
    lse_tail = read.tail_max + read.tail_sum.log()
    lse = torch.logaddexp(lse_tail, read.of_kept.masked_fill(~kept, -torch.inf).logsumexp(1))
    log_probs = StudentLogProbs(
        # Unused entries stay finite: 0 * -inf is not a number.
        log_q=(read.of_kept - lse[:, None]).masked_fill(~kept, 0),
        log_q_tail=torch.where(read.tail_sum == 0, LOG_EMPTY_TAIL, lse_tail - lse),
        log_q_draws=(read.of_draws - lse[:, None]).masked_fill(~drawn, 0),
        log_q_label=read.of_label - lse,
    )
    return LogitView(log_probs=log_probs, memory=logits, readings=read, passes=passes)
