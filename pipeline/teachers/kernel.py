"""From logits to targets: top K, exact tail, label and tail draws of full softmaxes. Torch only, no engine.

Shape letters: `N` target positions, `V` vocabulary (logit columns), `K` teacher top-k, `D` draws.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from storage_schema.rows import LOG_FLOOR, TeacherTargets


def summarise(
    logits: Tensor,
    labels: Tensor,
    uniforms: np.ndarray,
    *,
    top_k: int,
    min_prob: float,
    kept_draws: int,
    token_count: int,
) -> TeacherTargets:
    """Targets of `logits [N, V]` (any float type) with `labels int64 [N]` and `uniforms float64 [N, D]`.

    Columns from `token_count` on (padding rows of the head) are removed before the softmax. Totals are taken in
    float64: a float32 log-softmax over 32,000 entries alone is off by 5e-6. The tail is the sum of the entries outside
    the kept ids, never 1 minus the rest. The kept ids are the top K after the floor, and tail, label and draws are
    relative to them. Draws: the kept ids' mass is laid first on the unit interval; a uniform below it is a draw inside
    and is dropped, the others are looked up on the cumulative sum of the tail alone, and the first `kept_draws` of them
    are kept: chosen by their place, they are iid draws from the tail still.
    """
    scores = logits[:, :token_count].float()
    values, ids = torch.topk(scores, top_k, dim=-1)
    values, ids = _ties_by_id(values, ids)
    weights = torch.exp(scores - values[:, :1]).double()
    total = weights.sum(-1)
    kept_weights = weights.gather(1, ids)
    kept = kept_weights >= min_prob * total[:, None]
    kept[:, 0] = True

    # Entries under the floor go back to the tail: only kept ones are blanked out.
    tail = weights.scatter(1, ids, torch.where(kept, 0.0, kept_weights))
    tail_total = tail.sum(-1)
    log_total = torch.log(total)
    logprobs = (values - values[:, :1]).double() - log_total[:, None]
    label_logprob = (scores.gather(1, labels[:, None]) - values[:, :1]).double()[:, 0] - log_total
    draw_ids, draw_counts = _tail_draws(
        tail, total, tail_total, torch.from_numpy(uniforms).to(scores.device), kept_draws
    )
    return TeacherTargets(
        ids=torch.where(kept, ids, ids[:, :1]).int().cpu().numpy(),
        logprobs=torch.where(kept, logprobs, -torch.inf).float().cpu().numpy(),
        counts=kept.sum(-1).int().cpu().numpy(),
        log_tail=(torch.log(tail_total) - log_total).clamp(min=LOG_FLOOR, max=0.0).float().cpu().numpy(),
        label_logprob=label_logprob.clamp(max=0.0).float().cpu().numpy(),
        draw_ids=draw_ids.int().cpu().numpy(),
        draw_counts=draw_counts.int().cpu().numpy(),
    )


def _ties_by_id(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Descending values, equal ones by ascending id: the order that `topk` gives to ties is unspecified."""
    by_id = ids.argsort(dim=-1)
    values, ids = values.gather(1, by_id), ids.gather(1, by_id)
    by_value = values.argsort(dim=-1, descending=True, stable=True)
    return values.gather(1, by_value), ids.gather(1, by_value)


def _tail_draws(
    tail: Tensor, total: Tensor, tail_total: Tensor, uniforms: Tensor, kept_draws: int
) -> tuple[Tensor, Tensor]:
    """Ids `[R]` of the draws that fall into the tail, in draw order, and how many `[N]` each position has."""
    depth = uniforms * total[:, None] - (total - tail_total)[:, None]
    hit = (depth >= 0) & (tail_total > 0)[:, None]
    hit &= hit.cumsum(-1) <= kept_draws
    cumulative = tail.cumsum(-1)
    # A rounding of the last sum must not step past the last entry that has any mass.
    depth = torch.minimum(depth.clamp(min=0.0), torch.nextafter(cumulative[:, -1:], cumulative.new_zeros(())))
    found = torch.searchsorted(cumulative, depth, right=True)
    return found[hit], hit.sum(-1)
