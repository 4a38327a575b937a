"""What a configuration means: a checked `LossConfig` comes in, an `Objective` and (for TAID) its schedule go out.

What the dataset cannot give is said here, when the loss is chosen: an error where the loss would be another one, a line
in the log where it is a bound or an estimate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from coldstill.trainer.errors import DenseLossOnly, NoDrawLogprobs, NoDraws
from coldstill.trainer.loss_config import TAILS, LossConfig, TailName

from .adaptive_kl import AdaptiveKl
from .cross_entropy import CrossEntropy
from .ctkd import Ctkd
from .divergences import JensenShannon, ReverseKl, SkewForwardKl, SkewReverseKl, TotalVariation
from .dkd import Dkd
from .mass_corrected import MassCorrectedTaid
from .memory import LossMemory
from .objective import Objective
from .protocol import SparseLoss
from .schedule import TaidSchedule
from .taid import AtTeacher, ForwardKl, Taid
from .truncated import RenormalisedTaid, ZeroTailTaid
from .uniform_tail import UniformTail, UniformTailObjective

LARGE_TAIL_MASS = 0.05
"""Mean tail mass above which the bucket is warned of: below, .93 to .99 of dense TAID's gain was kept; at .34, .05."""

_DIVERGENCES: dict[str, Callable[..., SparseLoss]] = {
    "reverse_kl": ReverseKl,
    "js": JensenShannon,
    "tvd": TotalVariation,
    "skew_forward_kl": SkewForwardKl,
    "skew_reverse_kl": SkewReverseKl,
}
_BOUNDS: dict[str, Callable[..., SparseLoss]] = {"adaptive_kl": AdaptiveKl, "dkd": Dkd}

log = logging.getLogger(__name__)


def build_objective(
    config: LossConfig, *, draws: int, mean_tail_mass: float, dense: bool = False, draw_logprobs: bool = False
) -> Objective:
    """The objective that `config` names, for a dataset with these facts.

    `draws`: per position, as captured. `mean_tail_mass`: outside the kept ids, over all targets. `dense`: every id of
    the vocabulary is kept at every position. `draw_logprobs`: the draws' log-probs are there too.
    Raises `NoDraws`, `NoDrawLogprobs`, `DenseLossOnly`.
    """
    tail = _tail(config, draws=draws)
    _check_tail(tail, draws=draws, draw_logprobs=draw_logprobs)
    if config.name == "ctkd" and not dense:
        raise DenseLossOnly(
            "loss.name",
            found=f"ctkd, and a dataset that leaves {mean_tail_mass:.4f} of the teacher's mass outside its kept ids",
            wanted="a dataset that keeps every id: ctkd divides log-probs by up to 21, and what is left out at "
            "temperature 1 is nearly all of the mass there",
            fix="choose another loss, such as taid or forward_kl, or capture with top_k equal to the vocabulary",
        )
    _say_what_is_left_out(config.name, tail, mean_tail_mass=mean_tail_mass, dense=dense)
    if tail == "uniform":
        return UniformTailObjective(UniformTail(at_teacher=config.name == "forward_kl"), config.cross_entropy_share)
    return Objective(_loss(config, tail), config.cross_entropy_share)


def build_schedule(config: LossConfig) -> TaidSchedule | None:
    """TAID's schedule of t; None for the losses that have no t."""
    if config.name != "taid":
        return None
    options = config.options
    return TaidSchedule(kind=options.pop("schedule"), **options)


def memory_of(objective: Objective) -> LossMemory | None:
    """What the objective's loss remembers between optimizer steps, for the loop to close and to save; most do not."""
    return getattr(objective.distillation, "memory", None)


def _loss(config: LossConfig, tail: TailName) -> SparseLoss:
    if config.name == "cross_entropy":
        return CrossEntropy()
    if config.name == "ctkd":
        return Ctkd()
    if config.name in _BOUNDS:
        return _BOUNDS[config.name](**config.options)
    if config.name in _DIVERGENCES:
        return _DIVERGENCES[config.name](**config.options, tail=tail)
    if tail == "mass_corrected":
        return MassCorrectedTaid()
    if tail == "mixture" or tail == "bucket":
        return Taid(tail) if config.name == "taid" else ForwardKl(tail)
    truncated = RenormalisedTaid() if tail == "renormalise" else ZeroTailTaid()
    return truncated if config.name == "taid" else AtTeacher(truncated)


def _tail(config: LossConfig, *, draws: int) -> TailName:
    """The tail that `auto` stands for: draws are used where there are some and the loss can use them."""
    if config.tail != "auto":
        return config.tail
    return "mixture" if draws and "mixture" in TAILS[config.name] else "bucket"


def _check_tail(tail: TailName, *, draws: int, draw_logprobs: bool) -> None:
    if tail in ("mixture", "mass_corrected") and draws == 0:
        raise NoDraws(
            "loss.tail",
            found=f"{tail}, and a dataset without tail draws",
            wanted="draws in the dataset, or another tail",
            fix="set loss.tail to auto or bucket, or capture the dataset again with draws",
        )
    if tail == "mass_corrected" and not draw_logprobs:
        raise NoDrawLogprobs(
            "loss.tail",
            found="mass_corrected, and a dataset with draws but without their log-probs",
            wanted="the log-prob of every draw, or another tail",
            fix="set loss.tail to mixture, or capture the dataset again with draw_logprobs",
        )


def _say_what_is_left_out(name: str, tail: TailName, *, mean_tail_mass: float, dense: bool) -> None:
    if dense or name in ("cross_entropy", "ctkd"):
        return
    left = f"{mean_tail_mass:.4f} of the teacher's mass on average is outside the kept ids of this dataset"
    if tail in ("renormalise", "zero", "uniform"):
        log.warning("loss %s with tail %s is for comparison, it is not the teacher's: %s", name, tail, left)
    elif name in _DIVERGENCES or name in _BOUNDS:
        log.warning("loss %s is taken over the kept ids and one symbol for the rest, not over all ids: %s", name, left)
    elif tail == "bucket" and mean_tail_mass > LARGE_TAIL_MASS:
        log.warning(
            "loss %s with tail bucket does not know the tail's shape, and %s: use draws, or a larger K", name, left
        )
