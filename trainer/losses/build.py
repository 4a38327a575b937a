"""What a configuration means: a checked `LossConfig` comes in, an `Objective` and (for TAID) its schedule go out."""

from __future__ import annotations

from trainer.config import LossConfig
from trainer.errors import NoDraws

from .cross_entropy import CrossEntropy
from .objective import Objective
from .schedule import TaidSchedule
from .taid import ForwardKl, Taid

FROM_TEACHER = {"taid": Taid, "forward_kl": ForwardKl}
"""Losses that read the cached distributions; each takes `tail`."""


def build_objective(config: LossConfig, *, draws: int) -> Objective:
    """The objective that `config` names, for a dataset captured with `draws` per position.

    Raises `NoDraws` where the mixture tail is asked for and there are none.
    """
    if config.name == "cross_entropy":
        return Objective(CrossEntropy())
    if config.tail == "mixture" and draws == 0:
        raise NoDraws(
            "loss.tail",
            found="mixture, and a dataset without tail draws",
            wanted="draws in the dataset, or another tail",
            fix="set loss.tail to auto or bucket, or capture the dataset again with draws",
        )
    tail = config.tail if config.tail != "auto" else "mixture" if draws else "bucket"
    return Objective(FROM_TEACHER[config.name](tail), config.cross_entropy_share)


def build_schedule(config: LossConfig) -> TaidSchedule | None:
    """TAID's schedule of t; None for the losses that have no t."""
    if config.name != "taid":
        return None
    return TaidSchedule(
        kind=config.schedule, t_start=config.t_start, t_end=config.t_end, alpha=config.alpha, beta=config.beta
    )
