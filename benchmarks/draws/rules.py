"""Rules by which a cache keeps a part of a teacher's distribution: kept ids, tail mass and draws from the tail.

These are references in plain torch: they see the whole distribution and may do what no capture does.

Shape letters: `N` positions, `V` vocabulary, `K` kept ids, `D` draws, `R` most draws of a position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.draws.plan import Control, Rule


@dataclass(frozen=True)
class Kept:
    """`ids int64 [N, K]`, `logprobs float64 [N, K]` (-inf where not kept), `tail float64 [N]`: the mass outside.

    `draws int64 [N, R]`, `weights float64 [N, R]`: the share of the tail of each, 0 where there is no draw.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    draws: Tensor
    weights: Tensor


def keep(probs: Tensor, rule: Rule, generator: torch.Generator) -> Kept:
    """What `rule` keeps of `probs float64 [N, V]`, which sum to 1."""
    best, ids = probs.topk(max(rule.top_k, 1), 1)
    kept = best >= rule.min_prob
    kept[:, 0] = True
    if rule.top_k == 0:
        kept[:] = False
    tail = probs.scatter(1, ids, torch.where(kept, 0.0, best))
    mass = tail.sum(1)
    logprobs = torch.where(kept, best, 0.0).log()
    if rule.draws == 0:
        nothing = probs.new_zeros(len(probs), 0)
        return Kept(ids, logprobs, mass, nothing.long(), nothing)
    followed = tail**rule.power if rule.power != 1 else tail
    counts = _counts(mass, rule, generator)
    draws, drawn = (
        _systematic(followed, counts, rule, generator)
        if rule.method == "systematic"
        else _iid(followed, counts, generator)
    )
    weights = drawn.double()
    if rule.power != 1:
        weights *= (tail.gather(1, draws) / followed.gather(1, draws).clamp_min(1e-300)).nan_to_num()
    return Kept(ids, logprobs, mass, draws, weights / weights.sum(1, keepdim=True).clamp_min(1e-300))


def target(kept: Kept, student: Tensor, teacher: Tensor, control: Control | None = None) -> Tensor:
    """`float64 [N, V]`: the forward KL's target; what the draws leave of the tail has the shape of `student [N, V]`."""
    is_kept = kept.logprobs > -torch.inf
    outside = student.scatter(1, kept.ids, torch.where(is_kept, 0.0, student.gather(1, kept.ids)))
    outside /= outside.sum(1, keepdim=True).clamp_min(1e-300)
    weights = kept.weights
    if control is not None:
        of_teacher = teacher.gather(1, kept.draws) / kept.tail.clamp_min(1e-300)[:, None]
        ratio = outside.gather(1, kept.draws) / of_teacher.clamp_min(1e-300)
        weights = weights * (1 - control.share * ratio.clamp_max(control.limit))
    outside *= (kept.tail * (1 - weights.sum(1)))[:, None]
    outside.scatter_add_(1, kept.ids, kept.logprobs.exp())
    return outside.scatter_add_(1, kept.draws, weights * kept.tail[:, None])


def _counts(mass: Tensor, rule: Rule, generator: torch.Generator) -> Tensor:
    """`int64 [N]`: draws of each position."""
    wanted = rule.draws * mass
    if rule.origin == "softmax":
        # The number of D independent draws that fall outside, or of D points.
        if rule.method == "iid":
            found = torch.binomial(torch.full_like(mass, rule.draws), mass.clamp(0, 1), generator=generator)
        else:
            found = torch.floor(wanted + torch.rand(len(mass), generator=generator, dtype=mass.dtype))
    elif rule.number == "fixed":
        found = torch.full_like(mass, rule.draws)
    elif rule.number == "rounded":
        found = torch.floor(wanted + torch.rand(len(mass), generator=generator, dtype=mass.dtype))
    else:
        found = torch.ceil(wanted)
    return (found * (mass > 1e-12)).long().clamp_max(rule.most)


def _iid(tail: Tensor, counts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    width = max(1, int(counts.max()))
    depths = torch.rand(len(tail), width, generator=generator, dtype=tail.dtype)
    return _at(tail, depths, torch.arange(width) < counts[:, None])


def _systematic(tail: Tensor, counts: Tensor, rule: Rule, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    width = max(1, int(counts.max()))
    shift = torch.rand(len(tail), 1, generator=generator, dtype=tail.dtype)
    depths = (torch.arange(width) + shift) / counts.clamp_min(1)[:, None]
    drawn = torch.arange(width) < counts[:, None]
    if rule.order == "id":
        return _at(tail, depths.clamp_max(1), drawn)
    order = tail.argsort(1, descending=True)
    places, drawn = _at(tail.gather(1, order), depths.clamp_max(1), drawn)
    return order.gather(1, places), drawn


def _at(tail: Tensor, depths: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The ids at `depths [N, R]` in [0, 1) of the cumulative sum of `tail [N, V]`."""
    sums = tail.cumsum(1)
    total = sums[:, -1:]
    found = torch.searchsorted(sums, torch.minimum(depths * total, total * (1 - 1e-12)), right=True)
    return found.clamp_max(tail.shape[1] - 1) * drawn, drawn
