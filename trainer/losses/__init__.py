"""The losses by name: a checked `LossConfig` comes in, one callable and (for TAID) its schedule go out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from trainer.config import LossConfig
from trainer.errors import NoDraws
from trainer.targets import SparseTargets

from .cross_entropy import cross_entropy_loss
from .forward_kl import forward_kl_loss
from .protocol import LossValues, SparseLoss
from .schedule import TaidSchedule
from .taid import taid_loss

FROM_TEACHER: dict[str, Callable[..., LossValues]] = {"taid": taid_loss, "forward_kl": forward_kl_loss}
"""Losses that read the cached distributions; each takes `tail`."""

__all__ = ["FROM_TEACHER", "LossValues", "SparseLoss", "TaidSchedule", "build_loss", "build_schedule"]


def build_loss(config: LossConfig, *, draws: int) -> SparseLoss:
    """The loss that `config` names, for a dataset captured with `draws` per position.

    Raises `NoDraws` where the mixture tail is asked for and there are none.
    """
    if config.name == "cross_entropy":
        return cross_entropy_loss
    if config.tail == "mixture" and draws == 0:
        raise NoDraws(
            "loss.tail",
            found="mixture, and a dataset without tail draws",
            wanted="draws in the dataset, or another tail",
            fix="set loss.tail to auto or bucket, or capture the dataset again with draws",
        )
    tail = config.tail if config.tail != "auto" else "mixture" if draws else "bucket"
    loss: SparseLoss = partial(FROM_TEACHER[config.name], tail=tail)
    return partial(_with_labels, loss, config.cross_entropy_share) if config.cross_entropy_share else loss


def build_schedule(config: LossConfig) -> TaidSchedule | None:
    """TAID's schedule of t; None for the losses that have no t."""
    if config.name != "taid":
        return None
    return TaidSchedule(
        kind=config.schedule, t_start=config.t_start, t_end=config.t_end, alpha=config.alpha, beta=config.beta
    )


def _with_labels(
    loss: SparseLoss, share: float, logits: torch.Tensor, targets: SparseTargets, *, t: float
) -> LossValues:
    values = loss(logits, targets, t=t)
    wide = logits.to(values.loss.dtype)
    labels = torch.nn.functional.cross_entropy(wide, targets.labels, reduction="none")
    return LossValues(
        loss=(1 - share) * values.loss + share * labels, distillation=values.distillation, bucket_kl=values.bucket_kl
    )
