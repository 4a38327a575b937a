"""The passes over `[M, V]` logits, all that costs anything in a loss: targets come in, what a loss needs of the logits
goes out, and the gradient by the logits is written over them. Everything of size `V` happens here and nowhere else.

Shape letters: `M` target positions, `V` vocabulary, `K` teacher top-k, `N` padded draws.

`PlainPasses` is torch alone. On CUDA it has a rival, `triton_passes`, which it checks: `fastest_passes` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from coldstill.trainer.targets import SparseTargets


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What a loss needs of logits z. `of_kept [M, K]`, `of_draws [M, N]`, `of_label [M]`: z where the targets point to.
    `tail_max [M]`: the largest z outside the kept ids; `tail_sum [M]`: the sum of exp(z - tail_max) there, at least 1.
    Where the kept ids are the whole vocabulary they are the lowest finite number and 0."""

    of_kept: torch.Tensor
    of_draws: torch.Tensor
    of_label: torch.Tensor
    tail_max: torch.Tensor
    tail_sum: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class RowGradient:
    """A gradient by logits z, without its bulk. `of_tail [M]`: the factor of exp(z - tail_max) outside the kept ids;
    `at_kept [M, K]`, `at_draws [M, N]`, `at_label [M]`: what is added at single ids; 0 at padding, repeats add up."""

    of_tail: torch.Tensor
    at_kept: torch.Tensor
    at_draws: torch.Tensor
    at_label: torch.Tensor


class RowPasses(Protocol):
    """Two passes over the same logits `[M, V]`, which they overwrite."""

    def read_(self, logits: torch.Tensor, targets: SparseTargets) -> Readings:
        """Read the logits; afterwards they hold whatever `write_` needs."""
        ...

    def write_(
        self, logits: torch.Tensor, targets: SparseTargets, readings: Readings, gradient: RowGradient
    ) -> torch.Tensor:
        """Write `gradient` in full into the memory that `read_` left behind."""
        ...


class PlainPasses:
    """On any device, in float32 or float64; `read_` leaves the softmax of the ids outside the kept ones, 0 at these.

    torch's own softmax goes over a row while it is in the cache. Its sum is one over its largest value, so the largest
    logit before and the largest value afterwards are all that is read besides."""

    def read_(self, logits: torch.Tensor, targets: SparseTargets) -> Readings:
        """Read the logits."""
        of_kept = logits.gather(1, targets.ids)
        of_draws = logits.gather(1, targets.draws)
        of_label = logits.gather(1, targets.labels[:, None])[:, 0]
        logits.scatter_(1, targets.ids, -torch.inf)
        tail_max = logits.amax(1)
        has_tail = tail_max != -torch.inf
        tail_sum = torch.softmax(logits, 1, out=logits).amax(1).reciprocal()
        if not has_tail.all():
            logits[~has_tail] = 0
        lowest = torch.finfo(logits.dtype).min
        return Readings(
            of_kept=of_kept,
            of_draws=of_draws,
            of_label=of_label,
            tail_max=tail_max.where(has_tail, lowest),
            tail_sum=tail_sum.where(has_tail, 0),
        )

    def write_(
        self, logits: torch.Tensor, targets: SparseTargets, readings: Readings, gradient: RowGradient
    ) -> torch.Tensor:
        """Write the gradient."""
        logits.mul_((gradient.of_tail * readings.tail_sum)[:, None])
        logits.scatter_add_(1, targets.ids, gradient.at_kept)
        logits.scatter_add_(1, targets.draws, gradient.at_draws)
        return logits.scatter_add_(1, targets.labels[:, None], gradient.at_label[:, None])
