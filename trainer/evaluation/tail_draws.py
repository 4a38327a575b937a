"""What the K+1 view leaves out, by draws: targets and the student's view come in, unbiased estimates go out.

Shape letters: `M` target positions, `N` padded draws.

With S the kept ids, `m_p` and `m_q` the tail masses, and `p'`, `q'` the distributions within the tail (chain rule):

    KL(p || q)           = KL over the K+1 view            + m_p KL(p' || q')
    - sum_v p_v log q_v  = cross-entropy over the K+1 view - m_p E_{v ~ p'}[log q'_v]

The first terms are known exactly. Of `D` iid draws from the teacher those outside S are iid from `p'`, however many of
them were kept; with n >= 1 their mean of `f` estimates `E_{p'}[f]` without bias, and with n = 0 nothing is known. There
is a draw with probability `s = 1 - (1 - m_p)^D`, so

    1[n >= 1] (m_p / s) mean_i f(draw_i)

has the expectation `m_p E_{p'}[f]` (Horvitz and Thompson 1952): unbiased also where most positions have no draw.
Nothing of the distribution is left out; what remains is the rounding of stored values, and noise that falls with the
number of positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs
from coldstill.trainer.targets import SparseTargets

if TYPE_CHECKING:
    from coldstill.trainer.data import LogitDataset


def draws_per_position(dataset: LogitDataset) -> int:
    """D of `dataset`; 0 where no unbiased estimate can be made of what it gives.

    That is where it holds no draws, where datasets with several D are mixed, and where fewer draws or kept ids than
    stored were asked for: a cut id is a draw of known weight, and a thinned list that was capped has another law.
    """
    sources = dataset.sources
    found = {one.header.draws if one.header.kept_draws else 0 for one in sources.datasets}
    whole = sources.top_k is None and sources.draws is None
    return found.pop() if whole and len(found) == 1 else 0


def tail_estimates(view: StudentLogProbs, targets: SparseTargets, *, draws: int) -> dict[str, torch.Tensor]:
    """The second terms above, in the dtype of `view`: `tail_cross_entropy [M]` of the student within the tail, weighted
    with the teacher's mass; `tail_kl [M]`, only where the log-probs of the draws are known.

    `draws` is D: how many draws each position was given at capture, before those inside S were dropped.
    """
    dtype = view.log_q.dtype
    log_tail = targets.log_tail.to(dtype)[:, None]
    weights = _weights(log_tail, draws) * targets.draw_weights.to(dtype)
    within_student = view.log_q_draws - view.log_q_tail[:, None]
    found = {"tail_cross_entropy": -_expect(weights, within_student)}
    if targets.draw_logprobs is not None:
        within_teacher = targets.draw_logprobs.to(dtype) - log_tail
        found["tail_kl"] = _expect(weights, within_teacher - within_student)
    return found


def _weights(log_tail: torch.Tensor, draws: int) -> torch.Tensor:
    """`m_p / s` `[M, 1]`. As the tail vanishes it goes to 1 / D, which neither form may lose to rounding."""
    mass = log_tail.exp().clamp_max(1)
    return mass / -torch.expm1(draws * torch.log1p(-mass))


def _expect(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sums of `weights * values`; padding, whose values say nothing, is left out."""
    return (weights * values).masked_fill(weights == 0, 0).sum(1)
