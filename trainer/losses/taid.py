"""TAID from a cache, with four treatments of the tail, and forward KL.

Shape letters: `M` target positions, `K` teacher top-k, `N` padded draws.

TAID (arXiv 2501.16937): `p_t = softmax((1 - t) sg(z_student) + t z_teacher)`, loss `KL(p_t || q)`, gradient
`q - p_t`. Logits are mixed, never probabilities: mixing those would give forward KL times t at every t.

The cache holds log-probs `l_v` of the teacher on the kept ids S, the mass `m_p` outside S, and some draws from there.
With `m_q` the student's mass outside S, and everything but `q` held fixed:

    a_v = (1 - t) log q_v + t l_v   (v in S),    a_T = (1 - t) log m_q + t log m_p,    P = softmax([a_S, a_T])
    target on S:       P_v
    target on the tail: P_T [ (1 - t W) q_v / m_q + t (weight of v among the draws) ]    W: the sum of the weights

Without draws (W = 0) this is the K+1 `bucket`: TAID against a teacher whose tail has the student's shape. With them
(`mixture`, W = 1), its expectation over the draws at t = 1 is the teacher itself, given that there is a draw. At t < 1
two gaps to dense TAID are left, both zero where the tails' shapes agree: inside the tail the mix is arithmetic, not
geometric, and the tail's mass is the largest that the cache allows. `mass_corrected` estimates the right mass.

THE VALUE is `KL(P || q)` over the K+1 view, plus the cross-entropy of the draws within the tail,
`t P_T sum(weight * (log m_q - log q_draw))`. It differs from the KL of the whole target by entropies of the target,
which are constants of the step: the gradient does not need them, and the entropy of a few draws carries no information
about the teacher. THE GRADIENT is that of this value with P fixed, and equals `q - target` exactly.

THE CORRECTED MASS. Dense TAID gives the tail the weight `sum over T of q^(1-t) p^t = m_q^(1-t) m_p^t R`, where q' and
p' are the two tails' shapes and `R = E over draws of r`, `r = (q' / p')^(1-t)`, at most 1. The bucket takes R = 1: most
of the error of its gradient at t < 1, which is .52 relative, against .14 with R estimated (t = .4, K = 16, 32 draws, a
flat teacher).

    R of a position = (sum of its r + c r_prior) / (its draws + c)

R is nearly one number for all positions, so the few draws of one position are shrunk to the mean of all draws of the
previous optimizer step, `r_prior`. That step is complete, so chunks, micro-batches and devices do not change it. R is
an estimate: at t = 0 the gradient is noise instead of 0 (no run trains there: the paper starts at .2 to .4). The shape
within the tail is mixed as in `mixture`. At t = 1 r is 1, and the correction has no effect.

THE CONTROL VARIATE. The draws are a noisy view of p', but the same draws are as noisy a view of q', which is known: the
mean of `q'_v / p'_v` at the draws is q' in expectation. `control_variate` takes the share `CONTROL_SHARE` of that noise
off: the weight w of a draw becomes `w (1 - share * q'_v / p'_v)`, which may be negative, and what is missing to 1 has
the student's shape. The expected target stays, but where a ratio is above `LARGEST_CONTROL`: there it is nearer to the
student's by what the limit takes off. The value is that of `mixture`, so that the schedule of t and the logs do not
depend on the choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .base import LossState, TeacherLoss
from .taid_schedule import TaidSchedule

if TYPE_CHECKING:
    import torch

    from coldstill.trainer.loss_kernels.fused_head import SparseLoss
    from coldstill.trainer.loss_kernels.logit_view import Buckets, StudentLogProbs
    from coldstill.trainer.targets import SparseTargets

PRIOR_DRAWS = 8.0
"""c: the number of own draws that weigh as much as the prior. Measured at t = .4 and .7, flat teacher: bias
.140 and .061 of the gradient with c = 8, .140 and .050 with 1, .169 and .075 with the prior alone."""

LARGEST_RATIO = 50.0
"""Upper limit of one draw's r: one draw likely for the student but not for the teacher would dominate the estimate."""

CONTROL_SHARE, LARGEST_CONTROL = 0.5, 4.0
"""The least noise, summed over both ends of a run and two teachers (`make bench-draws`). Without a limit, a few ids
that are likely for the student and rare for the teacher make the noise larger than it was."""

SMALLEST_NORMAL = 1.1754944e-38
"""The smallest normal float32; keeps divisions by 0 and logs of 0 finite."""


class Taid(TeacherLoss):
    """TAID with a schedule of t."""

    title: ClassVar[str] = "TAID"
    arxiv: ClassVar[str | None] = "2501.16937"

    name: Literal["taid"] = Field("taid", description="Temporally adaptive interpolated distillation; the default.")
    tail: Literal["auto", "mixture", "bucket", "mass_corrected", "control_variate"] = Field(
        "auto",
        description="Tail outside the top K: mixture uses the cached draws, bucket only the tail's total mass; "
        "mass_corrected and control_variate also use the draws' log-probs, for the tail's mass at t, or for less "
        "noise; auto is mixture if the dataset has draws, else bucket.",
    )
    schedule: Literal["adaptive", "linear"] = Field(
        "adaptive",
        description="How t moves. adaptive: by the paper's rule; linear: along a straight line over the run.",
    )
    t_start: float = Field(
        0.4,
        ge=0,
        le=1,
        description="t of the first step; the paper uses 0.2 to 0.4, more for a larger gap. Use 0.8 for a student with "
        "random weights, whose own distribution is noise (measured: docs/capacity.md).",
    )
    t_end: float = Field(1.0, ge=0, le=1, description="t at the end of the run; 1 is the teacher itself.")
    alpha: Literal["auto"] | float = Field(
        "auto", description="Speed of the adaptive rule; auto keeps the paper's curve at any number of steps."
    )
    beta: float = Field(0.99, ge=0, lt=1, description="Decay factor of the adaptive rule's momentum.")

    @model_validator(mode="after")
    def _t_rises(self) -> Taid:
        if isinstance(self.alpha, float) and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha of taid must be auto or in [0, 1], not {self.alpha:g}")
        if self.t_start > self.t_end:
            raise ValueError(f"t_start ({self.t_start}) must not be above t_end ({self.t_end})")
        return self

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value `[M]` at `t`; tail `auto` uses the draws that there are."""
        if self.tail == "mass_corrected":
            return self.function()(student, targets, t=t)
        return _interpolated_kl(student, targets, t, tail=self.tail)

    def function(self) -> SparseLoss:
        return MassCorrectedTaid() if self.tail == "mass_corrected" else self

    def new_schedule(self) -> TaidSchedule:
        return TaidSchedule(
            kind=self.schedule, t_start=self.t_start, t_end=self.t_end, alpha=self.alpha, beta=self.beta
        )


class ForwardKl(TeacherLoss):
    """`KL(teacher || student)` as far as the cache determines it: TAID held at t = 1.

    Exact on the kept ids and on the tail's total mass. `mixture` learns the tail's shape from the draws, without bias;
    `bucket` leaves it free, and its value is a lower bound of the dense KL.
    """

    title: ClassVar[str] = "forward KL to the teacher"
    arxiv: ClassVar[str | None] = None

    name: Literal["forward_kl"] = Field("forward_kl", description="KL(teacher || student): taid held at t = 1.")
    tail: Literal["auto", "mixture", "bucket", "control_variate"] = Field(
        "auto",
        description="Tail outside the top K: mixture uses the cached draws, bucket only the tail's total mass; "
        "control_variate also uses the draws' log-probs, for less noise; auto is mixture if the dataset has draws, "
        "else bucket.",
    )

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float = 1.0) -> torch.Tensor:
        """Value `[M]`; `t` is ignored."""
        return _interpolated_kl(student, targets, 1.0, tail=self.tail)


class TailRatio(LossState):
    """`value`: the mean of r over all draws of the previous optimizer step; 1 before the first."""

    value: float

    def __init__(self) -> None:
        super().__init__(sums=2)

    def initial_state(self) -> dict[str, Any]:
        return {"tail_ratio": 1.0}

    def update(self, sums: Sequence[float], *, step: int, total_steps: int) -> None:
        """`sums`: of r, and the number of draws; a step without draws changes nothing."""
        total, draws = sums
        if draws > 0:
            self.value = total / draws

    def logs(self) -> dict[str, float]:
        return {"taid_tail_ratio": self.value}

    def state_dict(self) -> dict[str, Any]:
        return {"tail_ratio": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["tail_ratio"]


class MassCorrectedTaid:
    """TAID with the `mixture` tail and its corrected mass. The targets must hold the draws' log-probs."""

    def __init__(self) -> None:
        self.state = TailRatio()

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value `[M]` at `t`; adds to the state where `student` requires a gradient."""
        both = student.buckets(targets)
        mean, draws = _tail_ratios(student.detach(), targets, t)
        if student.log_q.requires_grad:
            self.state.add((mean * draws).sum(), draws.sum())
        ratio = (mean * draws + PRIOR_DRAWS * self.state.value) / (draws + PRIOR_DRAWS)
        scores = _interpolated(both, t)
        # The student may give the draws no mass: log 0 would not be a target.
        scores[:, -1] += ratio.clamp_min(SMALLEST_NORMAL).log()
        log_target = both.log_softmax(scores)
        value = both.expect(log_target.exp(), log_target - both.log_q)
        return value + tail_term(student, targets, t * log_target[:, -1].exp())


def _interpolated_kl(student: StudentLogProbs, targets: SparseTargets, t: float, *, tail: str) -> torch.Tensor:
    """Value `[M]` of TAID with the tail `bucket`, `control_variate`, or else `mixture`."""
    both = student.buckets(targets)
    log_target = both.log_softmax(_interpolated(both, t))
    value = both.expect(log_target.exp(), log_target - both.log_q)
    if tail == "bucket":
        return value
    mass = t * log_target[:, -1].exp()
    plain = tail_term(student, targets, mass)
    if tail != "control_variate":
        return value + plain
    with_less_noise = tail_term(student, targets, mass, _noise_removed(student.detach(), targets))
    return value + with_less_noise + (plain - with_less_noise).detach()


def _interpolated(both: Buckets, t: float) -> torch.Tensor:
    """`a [M, K+1]`: log of the target before it is normalized; the student's part has no gradient."""
    return both.log_q.detach().lerp(both.log_p, t)


def tail_term(
    student: StudentLogProbs, targets: SparseTargets, mass: torch.Tensor, factors: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy `[M]` within the tail of draws that together hold `mass [M]`; 0 if there are no draws. `factors
    [M, N]`: of the draws' weights."""
    weights = mass[:, None] * targets.draw_weights
    if factors is not None:
        weights = weights * factors
    return (weights * (student.log_q_tail[:, None] - student.log_q_draws)).sum(1)


def _noise_removed(student: StudentLogProbs, targets: SparseTargets) -> torch.Tensor:
    """Factors `[M, N]` of the draws' weights by which the `control_variate` takes off a share of their noise."""
    return 1 - CONTROL_SHARE * _log_ratios(student, targets).clamp_max(math.log(LARGEST_CONTROL)).exp()


def _tail_ratios(student: StudentLogProbs, targets: SparseTargets, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean of r `[M]`, 0 without draws, and the number of equal draws `[M]` that it is worth."""
    weights = targets.draw_weights.to(student.log_q.dtype)
    log_ratio = ((1 - t) * _log_ratios(student, targets)).clamp_max(math.log(LARGEST_RATIO))
    whole = weights.sum(1)
    # Draws of unequal weight are worth fewer equal ones (Kish); n draws of 1 / n are worth n.
    worth = whole.square() / weights.square().sum(1).clamp_min(SMALLEST_NORMAL)
    return (weights * log_ratio.exp()).sum(1) / whole.clamp_min(SMALLEST_NORMAL), worth


def _log_ratios(student: StudentLogProbs, targets: SparseTargets) -> torch.Tensor:
    """`log(q' / p') [M, N]` at the draws, of the two tails' shapes; 0 at unused entries."""
    assert targets.draw_logprobs is not None
    dtype = student.log_q.dtype
    of_student = student.log_q_draws - student.log_q_tail[:, None]
    of_teacher = targets.draw_logprobs.to(dtype) - targets.log_tail.to(dtype)[:, None]
    return (of_student - of_teacher).masked_fill(targets.draw_weights <= 0, 0)
