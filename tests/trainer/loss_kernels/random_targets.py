"""Random targets of every kind that a cache can hold, and the student's view by the plainest code: a log-softmax over
the whole vocabulary, one position at a time. Shares no code with what it checks.

Shape letters: `M` target positions, `V` vocabulary, `K` teacher top-k, `N` padded draws.
"""

from __future__ import annotations

import torch

from coldstill.trainer.loss_kernels.fused_head import Objective
from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs
from coldstill.trainer.losses.cross_entropy import CrossEntropy
from coldstill.trainer.losses.taid import ForwardKl, Taid
from coldstill.trainer.targets import SparseTargets

OBJECTIVES = {
    "taid": Objective(Taid()),
    "bucket with a share of cross-entropy": Objective(Taid(tail="bucket"), 0.3),
    "forward_kl": Objective(ForwardKl()),
    "cross_entropy": Objective(CrossEntropy()),
}


def random_targets(
    positions: int,
    vocabulary: int,
    *,
    top_k: int = 5,
    most_draws: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> SparseTargets:
    """Targets of a random teacher: some positions with pads, some without draws, draws that repeat, labels anywhere.
    Where `top_k` is the vocabulary there is no tail."""
    random = torch.Generator().manual_seed(seed)
    teacher = (2 * torch.randn(positions, vocabulary, generator=random, dtype=torch.float64)).log_softmax(1)
    ids = torch.rand(positions, vocabulary, generator=random).topk(top_k, 1).indices
    counts = torch.randint(1, top_k + 1, (positions, 1), generator=random)
    counts[::2] = top_k
    used = torch.arange(top_k) < counts
    ids = torch.where(used, ids, ids[:, :1])
    tail = teacher.clone().scatter_(1, ids, -torch.inf)
    draws = torch.zeros(positions, most_draws, dtype=torch.int64)
    drawn = torch.zeros(positions, most_draws, dtype=torch.bool)
    if top_k < vocabulary and most_draws and positions:
        draws = torch.multinomial(tail.exp(), most_draws, replacement=True, generator=random)
        draws[-1] = draws[-1, 0]
        drawn = torch.arange(most_draws) < torch.randint(0, most_draws + 1, (positions, 1), generator=random)
        drawn[0], drawn[-1] = False, True
    weights = drawn / drawn.sum(1, keepdim=True).clamp_min(1)
    labels = torch.randint(vocabulary, (positions,), generator=random)
    labels[::3] = ids[::3, 0]
    return SparseTargets(
        ids=ids,
        logprobs=teacher.gather(1, ids).masked_fill(~used, -torch.inf).to(dtype),
        log_tail=tail.logsumexp(1).clamp_min(-60).to(dtype),
        labels=labels,
        label_logprob=teacher.gather(1, labels[:, None])[:, 0].to(dtype),
        draws=draws * drawn,
        draw_weights=weights.to(dtype),
        draw_logprobs=None,
        row=torch.zeros(positions, dtype=torch.int64),
        position=torch.arange(positions),
    )


def plain_view(logits: torch.Tensor, targets: SparseTargets) -> StudentLogProbs:
    """What the student says where `targets` point, differentiable by `logits [M, V]`."""
    log_q, zero = logits.log_softmax(1), logits.new_zeros(())
    of_kept, of_tail, of_draws = [], [], []
    for m in range(len(logits)):
        used = targets.logprobs[m] > -torch.inf
        kept = set(targets.ids[m][used].tolist())
        tail = [v for v in range(logits.shape[1]) if v not in kept]
        of_kept.append(torch.where(used, log_q[m][targets.ids[m]], zero))
        of_tail.append(log_q[m][tail].logsumexp(0) if tail else zero - 60)
        of_draws.append(torch.where(targets.draw_weights[m] > 0, log_q[m][targets.draws[m]], zero))
    return StudentLogProbs(
        log_q=torch.stack(of_kept),
        log_q_tail=torch.stack(of_tail),
        log_q_draws=torch.stack(of_draws),
        log_q_label=log_q[torch.arange(len(logits)), targets.labels],
    )
