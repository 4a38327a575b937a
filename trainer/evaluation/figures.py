"""The figures of each target position: divergences, accuracy, masses, from the logits and the cached targets.

Shape letters: `M` target positions, `K` teacher top-k, `V` ids of the tokenizer, `N` padded draws.

Every figure is a float64 `[M]` under the name of its mean in the report; `report.py` defines each one. Arrays of width
V are float32, or float64 if the logits are; all others are float64.

The tail draws of a cache give unbiased estimates of the dense KL and cross-entropy. With S the kept ids, `m_p` and
`m_q` the tail masses, and `p'`, `q'` the distributions within the tail (chain rule):

    KL(p || q)           = KL over the K+1 view            + m_p KL(p' || q')
    - sum_v p_v log q_v  = cross-entropy over the K+1 view - m_p E_{v ~ p'}[log q'_v]

The first terms are known exactly. Of `D` iid draws from the teacher, those outside S are iid from `p'`, also if only
some of them were stored. Systematic draws are an unbiased sample of `p'` given their number. With n >= 1 stored draws,
their mean of `f` is an unbiased estimate of `E_{p'}[f]`; n = 0 gives none. At least one draw is outside S with
probability `s = 1 - (1 - m_p)^D`; where the number is `D m_p`, rounded with that mean, `s = min(1, D m_p)`. So

    1[n >= 1] (m_p / s) mean_i f(draw_i)

has the expectation `m_p E_{p'}[f]` (Horvitz and Thompson 1952), also if most positions have no draw. The remaining
errors are the rounding of stored values, and noise that falls with the number of positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs, forward_
from coldstill.trainer.targets import SparseTargets

if TYPE_CHECKING:
    from coldstill.trainer.data.logit_dataset import LogitDataset

HEAD_IDS = 10
"""The head of a position is this many of the teacher's most probable ids (TAID, arXiv 2501.16937, table 3), or all K if
they are fewer."""
LAST_SHARE = 5
"""The last fifth of the ids: the 80th to 100th percentile of table 3 of the TAID paper."""

Figures = dict[str, torch.Tensor]


def draws_per_position(dataset: LogitDataset) -> int:
    """D of `dataset`; 0 if it allows no unbiased estimate.

    It allows none without draws, with datasets of several D, or with fewer draws or kept ids than stored: a cut id
    becomes a draw of known weight, and a subset of a capped list of draws has another distribution. The weights are
    known for D independent draws from the softmax, and for a number by the tail's mass.
    """
    sources = dataset.sources
    headers = [one.header for one in sources.datasets]
    found = {(one.draws if one.kept_draws else 0, one.has_draws_by_tail_mass) for one in headers}
    known = all(one.has_plain_draws or one.has_draws_by_tail_mass for one in headers)
    whole = sources.top_k is None and sources.draws is None and known
    return found.pop()[0] if whole and len(found) == 1 else 0


def drawn_by_tail_mass(dataset: LogitDataset) -> bool:
    """Whether the number of draws follows the tail's mass, where `draws_per_position` is above 0."""
    return dataset.header.has_draws_by_tail_mass


def cache_figures(logits: torch.Tensor, targets: SparseTargets, *, draws: int, by_tail_mass: bool = False) -> Figures:
    """Figures of the student's `logits [M, V]` against the cached teacher.

    `draws`: draws per position at capture (`draws_per_position`); 0 skips the estimates. `by_tail_mass`: see
    `drawn_by_tail_mass`.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    top_1 = wide.max(1)
    label_logits = wide.gather(1, targets.labels[:, None])[:, 0]
    view = _in_float64(forward_(wide, targets).log_probs)
    # Logit minus log-prob is the same for all ids of a position.
    log_confidence = (top_1.values - label_logits).double() + view.log_q_label

    order = by_probability(targets)
    teacher_top_1 = targets.ids.gather(1, order[:, :1])[:, 0]
    return {
        "cross_entropy": -view.log_q_label,
        "teacher_cross_entropy": -targets.label_logprob.double(),
        "accuracy": (top_1.indices == targets.labels).double(),
        "confidence": log_confidence.exp().clamp_max(1),
        "top1_agreement": (top_1.indices == teacher_top_1).double(),
        **_divergences(view, targets, draws=draws, by_tail_mass=by_tail_mass),
        **_masses(view, targets, order),
    }


def dense_figures(logits: torch.Tensor, teacher_logits: torch.Tensor, targets: SparseTargets) -> Figures:
    """Figures of the student's `logits [M, V]` against the `teacher_logits [M, V]` of a resident teacher.

    Only these include KL divergences that are neither bounds nor estimates. About eleven float32 arrays `[M, V]`, the
    logits included, exist at once.
    """
    log_q, log_p = _log_softmax(logits), _log_softmax(teacher_logits)
    p, q = log_p.exp(), log_q.exp()
    # Ranked by the teacher at each position.
    last = log_p.topk(-(-log_p.shape[1] // LAST_SHARE), dim=1, largest=False, sorted=False).indices
    return {
        "forward_kl": _expect(p, log_p - log_q),
        "reverse_kl": _expect(q, log_q - log_p),
        "last_fifth_mass": q.gather(1, last).sum(1, dtype=torch.float64),
        "teacher_last_fifth_mass": p.gather(1, last).sum(1, dtype=torch.float64),
        # `log_p` serves as logits: another log-softmax leaves it unchanged, and its memory is reused.
        "cached_teacher_kl": forward_(log_p, targets).log_probs.buckets(targets).kl().double(),
    }


def by_probability(targets: SparseTargets) -> torch.Tensor:
    """`int64 [M, K]`: columns of the kept entries, most probable first, equal ones by id, unused ones last."""
    by_id = targets.ids.argsort(dim=1, stable=True)
    return by_id.gather(1, targets.logprobs.gather(1, by_id).argsort(dim=1, descending=True, stable=True))


def _divergences(view: StudentLogProbs, targets: SparseTargets, *, draws: int, by_tail_mass: bool) -> Figures:
    both = view.buckets(targets)
    found = {
        "forward_kl_lower_bound": both.expect(both.log_p.exp(), both.log_p - both.log_q),
        "reverse_kl_lower_bound": both.expect(both.log_q.exp(), both.log_q - both.log_p),
    }
    if draws == 0:
        return found
    tail = _tail_estimates(view, targets, draws=draws, by_tail_mass=by_tail_mass)
    found["soft_cross_entropy_estimate"] = tail["tail_cross_entropy"] - both.expect(both.log_p.exp(), both.log_q)
    if "tail_kl" in tail:
        found["forward_kl_estimate"] = found["forward_kl_lower_bound"] + tail["tail_kl"]
        found["tail_kl_estimate"] = tail["tail_kl"]
    return found


def _tail_estimates(
    view: StudentLogProbs, targets: SparseTargets, *, draws: int, by_tail_mass: bool
) -> dict[str, torch.Tensor]:
    """The second terms of the sums at the head of this file, `float64 [M]`.

    `tail_cross_entropy`: of the student within the tail, weighted with the teacher's mass. `tail_kl`: only if the
    log-probs of the draws are stored. `draws` is D: draws per position at capture, those inside S included.
    """
    dtype = view.log_q.dtype
    log_tail = targets.log_tail.to(dtype)[:, None]
    weights = (_mass_weights if by_tail_mass else _weights)(log_tail, draws) * targets.draw_weights.to(dtype)
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


def _mass_weights(log_tail: torch.Tensor, draws: int) -> torch.Tensor:
    """`m_p / min(1, D m_p)` `[M, 1]`."""
    return log_tail.exp().clamp(1 / draws, 1)


def _masses(view: StudentLogProbs, targets: SparseTargets, order: torch.Tensor) -> Figures:
    student = (view.log_q.exp() * targets.kept).gather(1, order)
    teacher = targets.logprobs.double().exp().gather(1, order)
    tail = view.log_q_tail.exp()
    return {
        "head_mass": student[:, :HEAD_IDS].sum(1),
        # A sum, not 1 - head, which would round small masses to 0.
        "rest_mass": student[:, HEAD_IDS:].sum(1) + tail,
        "tail_mass": tail,
        "teacher_head_mass": teacher[:, :HEAD_IDS].sum(1),
        "teacher_tail_mass": targets.log_tail.double().exp(),
    }


def _in_float64(view: StudentLogProbs) -> StudentLogProbs:
    return StudentLogProbs(**{name: tensor.double() for name, tensor in vars(view).items()})


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def _expect(probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`[M]`: sums of `probs * values` in float64, with 0 * inf = 0."""
    return (probs * values).masked_fill_(probs == 0, 0).sum(1, dtype=torch.float64)
