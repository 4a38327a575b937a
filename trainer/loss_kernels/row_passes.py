"""The contract of the two passes over `[M, V]` logits, and its check.

Shape letters: `M` target positions, `V` vocabulary, `K` teacher top-k, `N` padded draws.

Everything of size `V` in a loss happens in these passes. `PlainPasses` in `logit_view.py` and `TritonPasses` in
`triton_passes.py` implement them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from coldstill.trainer.targets import SparseTargets

LARGEST_DIFFERENCE = 1e-4
"""Largest difference between two float32 results that count as equal: absolute below 1, relative above."""


@dataclass(frozen=True, kw_only=True)
class RowReadings:
    """What the first pass reads of logits z. `of_kept [M, K]`, `of_draws [M, N]`, `of_label [M]`: z at these ids.
    `tail_max [M]`: the largest z outside the kept ids; `tail_sum [M]`: the sum of exp(z - tail_max) there, at least 1.
    If the kept ids are the whole vocabulary, these two are the lowest finite number and 0."""

    of_kept: torch.Tensor
    of_draws: torch.Tensor
    of_label: torch.Tensor
    tail_max: torch.Tensor
    tail_sum: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class RowGradient:
    """A gradient with respect to logits z, in compact form. `of_tail [M]`: the factor of exp(z - tail_max) outside the
    kept ids; `at_kept [M, K]`, `at_draws [M, N]`, `at_label [M]`: terms at single ids; 0 at padding; repeated ids add
    up."""

    of_tail: torch.Tensor
    at_kept: torch.Tensor
    at_draws: torch.Tensor
    at_label: torch.Tensor


class RowPasses(Protocol):
    """Two passes over the same logits `[M, V]`, both in place."""

    def read_(self, logits: torch.Tensor, targets: SparseTargets) -> RowReadings:
        """Read the logits, and leave in their memory what `write_` needs."""
        ...

    def write_(
        self, logits: torch.Tensor, targets: SparseTargets, readings: RowReadings, gradient: RowGradient
    ) -> torch.Tensor:
        """Write `gradient` in full, `[M, V]`, into the memory that `read_` left."""
        ...


def difference(passes: RowPasses, reference: RowPasses, device: torch.device, *, vocabulary: int = 20_011) -> float:
    """Largest difference between two implementations on random logits; NaN where either result has a NaN.

    The logits cover padding, repeated draws, positions without draws, labels inside and outside the kept ids."""
    positions, top_k, most_draws = 8, 6, 5
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(positions, vocabulary, generator=random)
    ids = torch.rand(positions, vocabulary, generator=random).topk(top_k).indices
    logprobs = torch.full((positions, top_k), -3.0)
    ids[3, 4:], logprobs[3, 4:] = ids[3, 0], -torch.inf
    drawn = torch.arange(most_draws) < torch.tensor([0, 1, 2, 3, 4, 5, 5, 0])[:, None]
    draws = torch.randint(vocabulary, (positions, most_draws), generator=random) * drawn
    draws[5] = draws[5, 0]
    row = torch.arange(positions)
    targets = SparseTargets(
        ids=ids,
        logprobs=logprobs,
        log_tail=torch.full((positions,), -1.0),
        labels=torch.where(row % 2 == 0, ids[:, 0], draws[:, 0]),
        label_logprob=torch.full((positions,), -1.0),
        draws=draws,
        draw_weights=drawn / drawn.sum(1, keepdim=True).clamp_min(1),
        draw_logprobs=None,
        row=row,
        position=row,
    ).to(device)
    gradient = RowGradient(
        of_tail=torch.randn(positions, generator=random).to(device),
        at_kept=torch.randn(positions, top_k, generator=random).to(device) * targets.kept,
        at_draws=torch.randn(positions, most_draws, generator=random).to(device) * (targets.draw_weights > 0),
        at_label=torch.randn(positions, generator=random).to(device),
    )
    sides = []
    for side in (passes, reference):
        memory = logits.to(device, copy=True)
        read = side.read_(memory, targets)
        sides.append([*vars(read).values(), side.write_(memory, targets, read, gradient)])
    gaps = [((one - other).abs() / (1 + other.abs())).max() for one, other in zip(*sides, strict=True)]
    return float(torch.stack(gaps).max())
