"""Forward KL from the cache: TAID held at t = 1. Logits and sparse targets come in, one loss per position goes out."""

from __future__ import annotations

from typing import Literal

import torch

from trainer.targets import SparseTargets

from .protocol import LossValues
from .taid import taid_loss


def forward_kl_loss(
    logits: torch.Tensor, targets: SparseTargets, *, t: float = 1.0, tail: Literal["mixture", "bucket"] = "mixture"
) -> LossValues:
    """`KL(teacher || student)` of `logits [M, V]` as far as the cache knows it; `t` is not looked at.

    Exact on the kept ids and on the tail's total mass. The tail's shape comes from the draws in expectation, and is
    left free by `bucket`, whose value is a lower bound of the dense KL.
    """
    return taid_loss(logits, targets, t=1.0, tail=tail)
