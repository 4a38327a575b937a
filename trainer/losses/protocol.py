"""What every loss of this folder takes and gives: logits and sparse targets come in, `LossValues` go out.

Shape letters: `M` target positions, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from trainer.targets import SparseTargets


@dataclass(frozen=True, kw_only=True)
class LossValues:
    """One value per target position, in nats; nothing is averaged here.

    `loss [M]`: what is learned; carries the gradient. `distillation [M]`: its part from the teacher alone, without
    gradient; the schedule of t listens to it. `bucket_kl [M]`: KL(teacher || student) over the K kept ids and ONE
    symbol for all the rest, without gradient: the same measure whatever the loss and t, made for people. It is a
    lower bound: never call it the KL to the teacher.
    """

    loss: torch.Tensor
    distillation: torch.Tensor
    bucket_kl: torch.Tensor


class SparseLoss(Protocol):
    """A loss of sparse targets."""

    def __call__(self, logits: torch.Tensor, targets: SparseTargets, *, t: float) -> LossValues:
        """`logits [M, V]` of the target positions, sliced to the ids of the tokenizer; `t` in [0, 1]."""
        ...
