"""One look at a student at target positions: its logits and the targets come in, a figure per position goes out.

Shape letters: `M` target positions, `K` teacher top-k, `V` ids of the tokenizer.

Every figure is a float64 `[M]` under the name that its mean has in the report (`report.py` says what each one is). What
is as wide as V is computed in float32, or float64 where the logits are, everything else in float64.
"""

from __future__ import annotations

import torch

from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs, forward_
from coldstill.trainer.targets import SparseTargets

from .tail_draws import tail_estimates

HEAD_IDS = 10
"""Most probable ids of the teacher whose mass counts as the head: table 3 of the TAID paper (arXiv 2501.16937)."""

Figures = dict[str, torch.Tensor]


def cache_figures(logits: torch.Tensor, targets: SparseTargets, *, draws: int) -> Figures:
    """Figures of the student's `logits [M, V]` against what the cache knows of the teacher.

    `draws`: how many each position was given at capture (see `tail_draws.py`); with 0 nothing is estimated from them.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    favourite = wide.max(1)
    label_logits = wide.gather(1, targets.labels[:, None])[:, 0]
    view = _in_float64(forward_(wide, targets).log_probs)
    # What lies between a logit and its log-prob is the same for all ids of a position.
    log_confidence = (favourite.values - label_logits).double() + view.log_q_label

    order = by_probability(targets)
    teachers_favourite = targets.ids.gather(1, order[:, :1])[:, 0]
    return {
        "cross_entropy": -view.log_q_label,
        "teacher_cross_entropy": -targets.label_logprob.double(),
        "accuracy": (favourite.indices == targets.labels).double(),
        "confidence": log_confidence.exp().clamp_max(1),
        "top1_agreement": (favourite.indices == teachers_favourite).double(),
        **_divergences(view, targets, draws=draws),
        **_masses(view, targets, order),
    }


def by_probability(targets: SparseTargets) -> torch.Tensor:
    """`int64 [M, K]`: places of the kept entries, most probable first, equal ones by id; unused ones come last."""
    by_id = targets.ids.argsort(dim=1, stable=True)
    return by_id.gather(1, targets.logprobs.gather(1, by_id).argsort(dim=1, descending=True, stable=True))


def _divergences(view: StudentLogProbs, targets: SparseTargets, *, draws: int) -> Figures:
    both = view.buckets(targets)
    found = {
        "forward_kl_lower_bound": both.expect(both.log_p.exp(), both.log_p - both.log_q),
        "reverse_kl_lower_bound": both.expect(both.log_q.exp(), both.log_q - both.log_p),
    }
    if draws == 0:
        return found
    tail = tail_estimates(view, targets, draws=draws)
    found["soft_cross_entropy_estimate"] = tail["tail_cross_entropy"] - both.expect(both.log_p.exp(), both.log_q)
    if "tail_kl" in tail:
        found["forward_kl_estimate"] = found["forward_kl_lower_bound"] + tail["tail_kl"]
        found["tail_kl_estimate"] = tail["tail_kl"]
    return found


def _masses(view: StudentLogProbs, targets: SparseTargets, order: torch.Tensor) -> Figures:
    student = (view.log_q.exp() * targets.kept).gather(1, order)
    teacher = targets.logprobs.double().exp().gather(1, order)
    tail = view.log_q_tail.exp()
    return {
        "head_mass": student[:, :HEAD_IDS].sum(1),
        # Added up, not 1 - head: what is small stays exact.
        "rest_mass": student[:, HEAD_IDS:].sum(1) + tail,
        "tail_mass": tail,
        "teacher_head_mass": teacher[:, :HEAD_IDS].sum(1),
        "teacher_tail_mass": targets.log_tail.double().exp(),
    }


def _in_float64(view: StudentLogProbs) -> StudentLogProbs:
    return StudentLogProbs(**{name: tensor.double() for name, tensor in vars(view).items()})
