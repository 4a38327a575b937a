"""The figures of each target position: divergences, accuracy, masses, from the logits and the cached targets.

Shape letters: `M` target positions, `K` teacher top-k, `V` ids of the tokenizer.

Every figure is a float64 `[M]` under the name of its mean in the report; `report.py` defines each one. Arrays of width
V are float32, or float64 if the logits are; all others are float64.
"""

from __future__ import annotations

import torch

from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs, forward_
from coldstill.trainer.targets import SparseTargets

from .tail_draws import tail_estimates

HEAD_IDS = 10
"""The head of a position is this many of the teacher's most probable ids (TAID, arXiv 2501.16937, table 3)."""
LAST_SHARE = 5
"""The last fifth of the ids: the 80th to 100th percentile of table 3 of the TAID paper."""

Figures = dict[str, torch.Tensor]


def cache_figures(logits: torch.Tensor, targets: SparseTargets, *, draws: int) -> Figures:
    """Figures of the student's `logits [M, V]` against the cached teacher.

    `draws`: draws per position at capture (see `tail_draws.py`); 0 skips the estimates.
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
        **_divergences(view, targets, draws=draws),
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
