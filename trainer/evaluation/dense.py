"""The student against a teacher that is in memory too: the logits of both come in, a figure per position goes out.

Shape letters: `M` target positions, `V` ids of the tokenizer.

For measuring only: nothing is learned with a resident teacher. Here alone stand KL divergences without a bound or an
estimate.
"""

from __future__ import annotations

import torch

from coldstill.trainer.loss_kernels.logit_view import forward_
from coldstill.trainer.targets import SparseTargets

from .figures import Figures

LAST_SHARE = 5
"""One id in so many counts as the last part: the 80th to 100th percentile of table 3 of the TAID paper."""


def dense_figures(logits: torch.Tensor, teacher_logits: torch.Tensor, targets: SparseTargets) -> Figures:
    """Figures of the student's `logits [M, V]` against `teacher_logits [M, V]`, float64 `[M]` each, named as in the
    report. With the logits about eleven float32 arrays `[M, V]` exist at once."""
    log_q, log_p = _log_softmax(logits), _log_softmax(teacher_logits)
    p, q = log_p.exp(), log_q.exp()
    # Each position has the ranking of its own teacher.
    last = log_p.topk(-(-log_p.shape[1] // LAST_SHARE), dim=1, largest=False, sorted=False).indices
    return {
        "forward_kl": _expect(p, log_p - log_q),
        "reverse_kl": _expect(q, log_q - log_p),
        "last_fifth_mass": q.gather(1, last).sum(1, dtype=torch.float64),
        "teacher_last_fifth_mass": p.gather(1, last).sum(1, dtype=torch.float64),
        # Of logits that a log-softmax went over already: it changes nothing, and the memory is there.
        "cached_teacher_kl": forward_(log_p, targets).log_probs.buckets(targets).kl().double(),
    }


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def _expect(probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`[M]` sums of `probs * values`, where 0 * inf is 0, added up in float64."""
    return (probs * values).masked_fill_(probs == 0, 0).sum(1, dtype=torch.float64)
