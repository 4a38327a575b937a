"""What a loss is: options, paper, needs, and its value per target position.

Shape letters: `M` target positions.

Every loss of this folder is a class derived from `Loss`; `docs/adding_a_loss.md` shows how to add one. Reading a
configuration loads all of them, so no file of this folder may load torch when it is imported: a loss uses the methods
of tensors, and imports torch inside a function where these are not enough.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from coldstill.common.models import FrozenModel
from coldstill.trainer.errors import DenseLossOnly, NoDrawLogprobs, NoDraws, NotStudentRows

from .taid_schedule import TaidSchedule

if TYPE_CHECKING:
    import torch

    from coldstill.trainer.loss_kernels.fused_head import Objective, SparseLoss
    from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs
    from coldstill.trainer.targets import SparseTargets

Need = Literal["draws", "draw_logprobs", "dense", "student_rows"]
"""`draws`: tail draws. `draw_logprobs`: the teacher's log-probs of the draws. `dense`: every id of the vocabulary.
`student_rows`: rows whose answers the student in training wrote, now or in an earlier round."""

TAIL_NEEDS: dict[str, frozenset[Need]] = {
    "mixture": frozenset({"draws"}),
    "mass_corrected": frozenset({"draws", "draw_logprobs"}),
    "control_variate": frozenset({"draws", "draw_logprobs"}),
    "forward_kl": frozenset({"draws"}),
}
"""What a treatment of the tail needs; those that are not named need only the stored tail mass."""

BucketTail = Literal["auto", "bucket"]
"""The tails of a loss that uses no draws."""

LARGE_TAIL_MASS = 0.05
"""Mean tail mass above which `bucket` warns: below it, .93 to .99 of dense TAID's gain was kept; at .34, .05."""

log = logging.getLogger(__name__)


class Loss(FrozenModel, ABC):
    """One loss. Its fields are its options, with the paper's values as defaults; `name` is what a configuration writes.

    A subclass must set `name` (a `Literal` with a default), `title`, `arxiv` and `__call__`; `TypeError` otherwise. It
    may have a field `tail`, a `Literal` of the treatments of the tail that it has, `auto` among them.
    """

    title: ClassVar[str]
    """What the model card calls the loss."""
    arxiv: ClassVar[str | None]
    """arXiv id of its paper; None if there is none."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What the loss needs of a dataset with any tail."""
    eval_loss: ClassVar[tuple[str, ...]] = (
        "forward_kl_estimate",
        "soft_cross_entropy_estimate",
        "forward_kl_lower_bound",
    )
    """Figures of the evaluation: the first one that a dataset allows is reported as `eval_loss`."""

    name: str = Field(description="Which loss.")

    @abstractmethod
    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value per position `[M]` in nats; `t` in [0, 1] is TAID's, other losses ignore it."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if cls.model_fields["name"].is_required():
            return  # a base class of losses
        missing = [name for name in ("title", "arxiv") if not hasattr(cls, name)]
        missing += sorted(getattr(cls, "__abstractmethods__", ()))
        missing += [f"a description of {name}" for name, field in cls.model_fields.items() if not field.description]
        if missing:
            raise TypeError(f"{cls.__name__}, a loss, lacks {', '.join(missing)}")

    @classmethod
    def tails(cls) -> tuple[str, ...]:
        """The treatments of the tail that the loss has, besides `auto`."""
        field = cls.model_fields.get("tail")
        return () if field is None else tuple(tail for tail in get_args(field.annotation) if tail != "auto")

    @property
    def all_needs(self) -> frozenset[Need]:
        """`needs`, and what the chosen options need."""
        return self.needs

    @property
    def heading(self) -> str:
        """Title and paper, for the model card."""
        tail = getattr(self, "tail", None)
        return (
            self.title
            + ("" if self.arxiv is None else f" (arXiv {self.arxiv})")
            + ("" if tail is None else f", tail: {tail}")
        )

    @property
    def label_share(self) -> float:
        """Weight of the labels' cross-entropy beside the loss itself."""
        return 0.0

    def function(self) -> SparseLoss:
        """What a training run calls: the loss itself, or an object with a `state`, if it keeps one between steps."""
        return self

    def new_schedule(self) -> TaidSchedule | None:
        """The schedule of t of a run; None for a loss that ignores t."""
        return None

    @model_serializer(mode="wrap")
    def _always_named(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Also where defaults are left out: each loss's name is its own default.
        return {"name": self.name, **fields(self)}


class TeacherLoss(Loss):
    """A loss against the teacher, which can be mixed with the cross-entropy of the rows' own tokens."""

    cross_entropy_share: float = Field(
        0.0, ge=0, le=1, description="Weight s of the labels' cross-entropy: (1 - s) loss + s cross-entropy."
    )

    @property
    def label_share(self) -> float:
        return self.cross_entropy_share


class LossState(ABC):
    """What a loss keeps between optimizer steps: sums of the current step, and the result of earlier ones.

    Calls with differentiable log-probs add to it; evaluation, without gradients, does not. The training loop closes
    each optimizer step:

        sums = all_reduce(state.take())                                    # every device, sum
        state.update(sums.tolist(), step=..., total_steps=...)             # the same numbers on every device

    The result therefore depends neither on chunks nor on micro-batches nor on devices, like t of TAID.
    """

    def __init__(self, sums: int):
        """`sums`: how many numbers are added up."""
        self.width = sums
        self.reset()

    def reset(self) -> None:
        """Back to the state before the first step."""
        self._sums: list[torch.Tensor] | None = None
        self.load_state_dict(self.initial_state())

    def add(self, *sums: torch.Tensor) -> None:
        """Add `sums`, scalars over the positions of one call; no synchronization with a GPU."""
        wide = [one.detach().double() for one in sums]
        self._sums = wide if self._sums is None else [one + other for one, other in zip(self._sums, wide, strict=True)]

    def take(self) -> torch.Tensor:
        """`float64` sums of this device since the last call; zeros on the CPU if it had no position."""
        import torch

        sums, self._sums = self._sums, None
        return torch.zeros(self.width, dtype=torch.float64) if sums is None else torch.stack(sums)

    @abstractmethod
    def initial_state(self) -> dict[str, Any]:
        """`state_dict` before the first step."""

    @abstractmethod
    def update(self, sums: Sequence[float], *, step: int, total_steps: int) -> None:
        """Close optimizer step number `step` (1 is the first) of `total_steps` with the sums of all devices."""

    @abstractmethod
    def logs(self) -> dict[str, float]:
        """Entries for the training log."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON types."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class TeacherStates(LossState):
    """The states of one loss for several teachers. A checkpoint keeps them in the order of the teachers."""

    def __init__(self, states: Sequence[LossState]):
        self._states = states
        super().__init__(sums=sum(state.width for state in states))

    def reset(self) -> None:
        for state in self._states:
            state.reset()

    def take(self) -> torch.Tensor:
        import torch

        parts = [state.take() for state in self._states]
        return torch.cat([part.to(parts[0].device) for part in parts])

    def initial_state(self) -> dict[str, Any]:
        return {"teachers": [state.initial_state() for state in self._states]}

    def update(self, sums: Sequence[float], *, step: int, total_steps: int) -> None:
        start = 0
        for state in self._states:
            state.update(sums[start : start + state.width], step=step, total_steps=total_steps)
            start += state.width

    def logs(self) -> dict[str, float]:
        """Those of each teacher, with its number from 1 behind each name."""
        found = enumerate((state.logs() for state in self._states), start=1)
        return {f"{name}_{number}": value for number, logs in found for name, value in logs.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"teachers": [state.state_dict() for state in self._states]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for one, saved in zip(self._states, state["teachers"], strict=True):
            one.load_state_dict(saved)


def join_objectives(objectives: Sequence[Objective], shares: Sequence[float]) -> Objective:
    """The weighted sum of what training minimizes with each teacher of an ensemble; without `shares` the only one."""
    if not shares:
        (objective,) = objectives
        return objective
    from coldstill.trainer.loss_kernels.ensemble import EnsembleObjective, TeacherLosses

    states = [state for objective in objectives if (state := state_of(objective)) is not None]
    losses = tuple(objective.distillation for objective in objectives)
    joined = TeacherLosses(losses, tuple(shares), TeacherStates(states) if states else None)
    return EnsembleObjective(joined, objectives[0].cross_entropy_share)


def with_tail(loss: Loss, *, draws: int) -> Loss:
    """`loss` with the tail that `auto` stands for on a dataset with so many draws per position."""
    if getattr(loss, "tail", None) != "auto":
        return loss
    return loss.model_copy(update={"tail": "mixture" if draws and "mixture" in loss.tails() else "bucket"})


def build_objective(
    loss: Loss,
    *,
    draws: int,
    mean_tail_mass: float,
    dense: bool = False,
    draw_logprobs: bool = False,
    not_by_student: Sequence[str] = ("the dataset",),
) -> Objective:
    """What training minimizes with `loss`, on a dataset with these facts. Logs a warning if it is a bound.

    `draws`: per position, as captured. `mean_tail_mass`: mass outside the kept ids, mean over all targets. `dense`:
    every id of the vocabulary is kept at every position. `draw_logprobs`: the dataset has the draws' log-probs.
    `not_by_student`: names of the datasets whose rows no student wrote.
    Raises `NoDraws`, `NoDrawLogprobs`, `DenseLossOnly`, `NotStudentRows`.
    """
    from coldstill.trainer.loss_kernels.fused_head import Objective

    loss = with_tail(loss, draws=draws)
    tail = getattr(loss, "tail", None)
    needs = loss.all_needs | TAIL_NEEDS.get(tail or "", frozenset())
    key, chosen = ("loss.name", loss.name) if needs == loss.all_needs else ("loss.tail", tail)
    if "draws" in needs and draws == 0:
        raise NoDraws(
            key,
            found=f"{chosen}, and a dataset without tail draws",
            wanted="draws in the dataset, or another tail",
            fix="set loss.tail to auto or bucket, or capture the dataset again with draws",
        )
    if "draw_logprobs" in needs and not draw_logprobs:
        raise NoDrawLogprobs(
            key,
            found=f"{chosen}, and a dataset with draws but without their log-probs",
            wanted="the log-prob of every draw, or another tail",
            fix="set loss.tail to mixture, or capture the dataset again with draw_logprobs",
        )
    if "dense" in needs and not dense:
        raise DenseLossOnly(
            key,
            found=f"{chosen}, and a dataset with {mean_tail_mass:.4f} of the teacher's mass outside its kept ids",
            wanted="a dataset that keeps every id of the vocabulary",
            fix="choose another loss, such as taid or forward_kl, or capture with top_k equal to the vocabulary",
        )
    if "student_rows" in needs and not_by_student:
        raise NotStudentRows(
            "loss.name",
            found=f"{loss.name}, and rows that the source or the teacher wrote, or a student under another prompt: "
            f"{', '.join(not_by_student)}",
            wanted="rows that the student wrote and the teacher scored",
            fix="make them with `coldstill rounds`, or with source.rows_of of answers in mode generate; for other "
            "rows, " + other_rows_fix(loss),
        )
    if not dense:
        _warn_of_truncation(loss, tail, mean_tail_mass)
    return Objective(loss.function(), loss.label_share)


def other_rows_fix(loss: Loss) -> str:
    """What to do to train on rows that the student did not write."""
    accepts = ", or set loss.any_rows to true" if "any_rows" in type(loss).model_fields else ""
    return f"choose another loss, such as forward_kl{accepts}"


def state_of(objective: Objective) -> LossState | None:
    """What the objective's loss keeps between optimizer steps, which the loop closes and saves; mostly None."""
    return getattr(objective.distillation, "state", None)


def _warn_of_truncation(loss: Loss, tail: str | None, mean_tail_mass: float) -> None:
    left = f"{mean_tail_mass:.4f} of the teacher's mass on average is outside the kept ids of this dataset"
    if tail == "bucket" and "mixture" not in loss.tails():
        log.warning("loss %s is computed over the kept ids and one bucket for the rest: %s", loss.name, left)
    elif tail == "bucket" and mean_tail_mass > LARGE_TAIL_MASS:
        log.warning(
            "loss %s with tail bucket does not learn the tail's shape, and %s: use draws, or a larger K",
            loss.name,
            left,
        )
