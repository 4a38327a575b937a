"""The sparse TAID loss: logits and sparse targets come in, one loss per position and its exact gradient go out.

Shape letters: `M` target positions, `V` vocabulary, `K` teacher top-k, `N` padded draws.

TAID (arXiv 2501.16937): `p_t = softmax((1 - t) sg(z_student) + t z_teacher)`, loss `KL(p_t || q)`, gradient
`q - p_t`. Logits are mixed, never probabilities: that would be forward KL times t, whatever t.

Of the teacher the cache knows log-probs `l_v` on the kept ids S, the mass `m_p` outside S, and some iid draws from
there. With `m_q` the student's mass outside S, and everything but `q` held fixed:

    a_v = (1 - t) log q_v + t l_v   (v in S),    a_T = (1 - t) log m_q + t log m_p,    P = softmax([a_S, a_T])
    target on S:       P_v
    target on the tail: P_T [ (1 - t) q_v / m_q + t (frequency of v among the draws) ]     the first part alone, whole,
                                                                                         where there is no draw

Without draws this is the K+1 bucket: TAID against a teacher whose tail has the student's shape. With them, at t = 1,
its expectation over the draws is the teacher itself, given that there is a draw.

THE VALUE is `KL(P || q)` over the K+1 view, plus the cross-entropy of the draws within the tail,
`t P_T mean(log m_q - log q_draw)`. It differs from the KL of the whole target by entropies of the target, which are
constants of the step: they are not needed for the gradient, and the entropy of a few draws says nothing about the
teacher. THE GRADIENT is that of this value with P fixed, and equals `q - target` exactly.

Numerics: the student's tail is summed on its own, shifted by its own maximum, never as 1 - sum: exact however small,
and no mass is lost to underflow. float32 at least; float64 in gives float64.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from trainer.targets import SparseTargets

from .protocol import LossValues

LOG_EMPTY_TAIL = -60.0
"""The student's log tail mass where the kept ids are the whole vocabulary: e^-60 is zero, and 0 * -60 is finite."""


def taid_loss(
    logits: torch.Tensor, targets: SparseTargets, *, t: float, tail: Literal["mixture", "bucket"] = "mixture"
) -> LossValues:
    """TAID at `t` of `logits [M, V]`; `bucket` leaves the draws aside, `mixture` uses them where a position has any."""
    draw_counts = targets.draw_counts if tail == "mixture" else torch.zeros_like(targets.draw_counts)
    loss, bucket_kl = _SparseTaid.apply(
        logits, targets.ids, targets.logprobs, targets.log_tail, targets.draws, draw_counts, t
    )
    return LossValues(loss=loss, distillation=loss.detach(), bucket_kl=bucket_kl)


class _SparseTaid(torch.autograd.Function):
    """Value and gradient in one pass over `[M, V]`: plain autograd of the same formula costs four times as much."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        ids: torch.Tensor,
        logprobs: torch.Tensor,
        log_tail: torch.Tensor,
        draws: torch.Tensor,
        draw_counts: torch.Tensor,
        t: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        z = logits.to(dtype, copy=True)
        kept = logprobs > -torch.inf
        drawn = torch.arange(draws.shape[1], device=draws.device) < draw_counts[:, None]

        z_kept = z.gather(1, ids)
        z_drawn = z.gather(1, draws)
        z.scatter_(1, ids, -torch.inf)
        shift = z.amax(1, keepdim=True)
        shift.masked_fill_(shift == -torch.inf, 0)
        exps = z.sub_(shift).exp_()
        tail_sum = exps.sum(1)
        lse_tail = shift[:, 0] + tail_sum.log()
        lse = torch.logaddexp(lse_tail, z_kept.masked_fill(~kept, -torch.inf).logsumexp(1))
        log_q_tail = torch.where(tail_sum > 0, lse_tail - lse, LOG_EMPTY_TAIL)

        # The K+1 view, tail last. Unused entries stay finite until after the interpolation: 0 * -inf is not a number.
        used = torch.cat([kept, torch.ones_like(kept[:, :1])], 1)
        log_q = torch.cat([z_kept - lse[:, None], log_q_tail[:, None]], 1).masked_fill(~used, 0)
        log_p = torch.cat([logprobs, log_tail[:, None]], 1).to(dtype).masked_fill(~used, 0)
        log_target, loss = _kl(torch.lerp(log_q, log_p, t), log_q, used)
        bucket_kl = loss if t == 1 else _kl(log_p, log_q, used)[1]
        target, q = log_target.exp(), log_q.exp()

        has_draw = (draw_counts > 0).to(dtype)
        per_draw = (t * target[:, -1] / draw_counts.clamp_min(1))[:, None] * drawn
        loss = loss + (per_draw * (lse_tail[:, None] - z_drawn).masked_fill(~drawn, 0)).sum(1)

        if ctx.needs_input_grad[0]:
            # With a tail its largest term is exp(0), so the sum is at least 1; without one `exps` is all zero.
            own_shape = (q[:, -1] - (1 - t * has_draw) * target[:, -1]) / tail_sum.clamp_min(1)
            gradient = exps.mul_(own_shape[:, None])
            gradient.scatter_add_(1, ids, (q - target)[:, :-1] * kept)
            gradient.scatter_add_(1, draws, -per_draw)
            ctx.save_for_backward(gradient)
            ctx.logits_dtype = logits.dtype
        ctx.mark_non_differentiable(bucket_kl)
        return loss, bucket_kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_bucket_kl: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[:, None]).to(ctx.logits_dtype), None, None, None, None, None, None


def _kl(scores: torch.Tensor, log_q: torch.Tensor, used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`log P [M, K+1]` with P the softmax of `scores`, and `KL(P || q) [M]`; entries not `used` have P = 0."""
    log_p = scores.masked_fill(~used, -torch.inf).log_softmax(1)
    return log_p, (log_p.exp() * (log_p.masked_fill(~used, 0) - log_q)).sum(1)
