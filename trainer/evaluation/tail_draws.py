"""Unbiased estimates of dense KL and cross-entropy from the tail draws of a cache.

Shape letters: `M` target positions, `N` padded draws.

With S the kept ids, `m_p` and `m_q` the tail masses, and `p'`, `q'` the distributions within the tail (chain rule):

    KL(p || q)           = KL over the K+1 view            + m_p KL(p' || q')
    - sum_v p_v log q_v  = cross-entropy over the K+1 view - m_p E_{v ~ p'}[log q'_v]

The first terms are known exactly. Of `D` iid draws from the teacher, those outside S are iid from `p'`, also if only
some of them were stored. With n >= 1 stored draws, their mean of `f` is an unbiased estimate of `E_{p'}[f]`; n = 0
gives none. At least one draw is outside S with probability `s = 1 - (1 - m_p)^D`, so

    1[n >= 1] (m_p / s) mean_i f(draw_i)

has the expectation `m_p E_{p'}[f]` (Horvitz and Thompson 1952), also if most positions have no draw. The remaining
errors are the rounding of stored values, and noise that falls with the number of positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs
from coldstill.trainer.targets import SparseTargets

if TYPE_CHECKING:
    from coldstill.trainer.data.logit_dataset import LogitDataset


def draws_per_position(dataset: LogitDataset) -> int:
    """D of `dataset`; 0 if it allows no unbiased estimate.

    It allows none without draws, with datasets of several D, or with fewer draws or kept ids than stored: a cut id
    becomes a draw of known weight, and a subset of a capped list of draws has another distribution.
    """
    sources = dataset.sources
    found = {one.header.draws if one.header.kept_draws else 0 for one in sources.datasets}
    whole = sources.top_k is None and sources.draws is None
    return found.pop() if whole and len(found) == 1 else 0


def tail_estimates(view: StudentLogProbs, targets: SparseTargets, *, draws: int) -> dict[str, torch.Tensor]:
    """The second terms above, `[M]` in the dtype of `view`.

    `tail_cross_entropy`: of the student within the tail, weighted with the teacher's mass. `tail_kl`: only if the
    log-probs of the draws are stored. `draws` is D: draws per position at capture, those inside S included.
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
    """`m_p / s` `[M, 1]`, by expm1 and log1p: as the tail vanishes it tends to 1 / D without loss of precision."""
    mass = log_tail.exp().clamp_max(1)
    return mass / -torch.expm1(draws * torch.log1p(-mass))


def _expect(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sums of `weights * values` without padding, whose values are undefined."""
    return (weights * values).masked_fill(weights == 0, 0).sum(1)
