"""The evaluation report: means of the figures over all target positions, and the calibration error.

Divergences and entropies are in nats per target; masses and rates are between 0 and 1. `p` is the teacher, `q` the
student. The head of a position is the teacher's 10 most probable ids, as far as the cache keeps them.

The expected calibration error is that of Guo et al. 2017 (arXiv 1706.04599, equations 2 to 5). Confidences are put into
15 bins of equal width, `((b - 1) / 15, b / 15]`; the error is the mean over all positions of |accuracy - confidence| of
their bin.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, JsonValue

from coldstill.common.models import FrozenModel

from .figures import Figures, draws_per_position

if TYPE_CHECKING:
    from coldstill.trainer.data.logit_dataset import LogitDataset

BINS = 15

Better = Literal["lower", "higher"]
Need = Literal["", "draws", "draw_logprobs", "teacher"]
_DIRECTIONS: dict[Any, Better | None] = {"lower": "lower", "higher": "higher", None: None}


def _better(direction: Better | None, *, needs: Need = "") -> dict[str, JsonValue]:
    """Which values of a metric are better, None if no end is, and what measuring it needs."""
    return {"better": direction, "needs": needs}


class CalibrationBin(FrozenModel):
    """Positions whose most probable token has a probability above `above` and at most `up_to`."""

    above: float
    up_to: float
    targets: int
    confidence: float | None = Field(description="Mean probability of the most probable token; None if empty.")
    accuracy: float | None = Field(description="How often that token is the label; None if empty.")


class EvaluationReport(FrozenModel):
    """Means over all target positions. A figure that was not measured is None."""

    targets: int = Field(description="Target positions.")
    cross_entropy: float = Field(
        description="-log q of the label.",
        json_schema_extra=_better("lower"),
    )
    perplexity: float = Field(
        description="exp of the cross-entropy.",
        json_schema_extra=_better("lower"),
    )
    teacher_cross_entropy: float = Field(description="-log p of the label, from the cache.")
    forward_kl_lower_bound: float = Field(
        description="KL(p || q) over the K kept ids and one symbol for all others: a lower bound of the dense KL. The "
        "training log's bucket_kl is its mean.",
        json_schema_extra=_better("lower"),
    )
    reverse_kl_lower_bound: float = Field(
        description="KL(q || p) over the same symbols: a lower bound of the dense KL.",
        json_schema_extra=_better("lower"),
    )
    forward_kl_estimate: float | None = Field(
        default=None,
        description="KL(p || q) over all ids, estimated without bias from draws with log-probs.",
        json_schema_extra=_better("lower", needs="draw_logprobs"),
    )
    forward_kl_estimate_error: float | None = Field(
        default=None,
        description="Upper bound of the standard error that the draws cause in forward_kl_estimate; it also contains "
        "the spread of the true values over positions.",
        json_schema_extra=_better(None, needs="draw_logprobs"),
    )
    tail_kl_estimate: float | None = Field(
        default=None,
        description="forward_kl_estimate minus forward_kl_lower_bound: the KL within the tail. May be negative.",
        json_schema_extra=_better("lower", needs="draw_logprobs"),
    )
    soft_cross_entropy_estimate: float | None = Field(
        default=None,
        description="-sum p log q over all ids, estimated without bias from draws: KL(p || q) plus the teacher's "
        "entropy, which is equal for all students. It ranks students if the draws have no log-probs.",
        json_schema_extra=_better("lower", needs="draws"),
    )
    forward_kl: float | None = Field(
        default=None,
        description="KL(p || q) over all ids; needs a resident teacher.",
        json_schema_extra=_better("lower", needs="teacher"),
    )
    reverse_kl: float | None = Field(
        default=None,
        description="KL(q || p) over all ids; needs a resident teacher.",
        json_schema_extra=_better("lower", needs="teacher"),
    )
    cached_teacher_kl: float | None = Field(
        default=None,
        description="KL from the cached to the resident teacher over the K+1 symbols. For the dataset's own teacher "
        "it is about the error of storage; a much larger value means another teacher, precision or alignment.",
        json_schema_extra=_better(None, needs="teacher"),
    )
    top1_agreement: float = Field(
        description="How often student and teacher have the same most probable token.",
        json_schema_extra=_better("higher"),
    )
    accuracy: float = Field(
        description="How often the student's most probable token is the label.", json_schema_extra=_better("higher")
    )
    confidence: float = Field(description="The student's probability of its most probable token.")
    expected_calibration_error: float = Field(
        description=f"Calibration error of the student on the labels, {BINS} bins of equal width (Guo et al. 2017).",
        json_schema_extra=_better("lower"),
    )
    head_mass: float = Field(description="The student's mass on the head (TAID, table 3).")
    rest_mass: float = Field(description="The student's mass on all other ids.")
    tail_mass: float = Field(description="The student's mass outside the kept ids.")
    teacher_head_mass: float = Field(description="The teacher's mass on the head.")
    teacher_tail_mass: float = Field(description="The teacher's mass outside the kept ids.")
    last_fifth_mass: float | None = Field(
        default=None,
        description="The student's mass on the 80th to 100th percentile of the ids, ranked by the resident teacher "
        "(TAID, table 3).",
        json_schema_extra=_better(None, needs="teacher"),
    )
    teacher_last_fifth_mass: float | None = Field(
        default=None,
        description="The teacher's mass on the same ids.",
        json_schema_extra=_better(None, needs="teacher"),
    )
    calibration: tuple[CalibrationBin, ...] = Field(description="The bins of expected_calibration_error.")

    def metrics(self) -> dict[str, float]:
        """All measured numbers by name."""
        return self.model_dump(exclude_none=True, exclude={"calibration"})


def measured_metrics(dataset: LogitDataset | None) -> dict[str, Better | None]:
    """Metrics of an evaluation on `dataset` without a resident teacher, each with its better direction, if it has one.

    With None, those that a dataset may allow. `loss` is the metric that `DistillTrainer` adds.
    """
    has = {"", "draws", "draw_logprobs"}
    if dataset is not None and not draws_per_position(dataset):
        has = {""}
    elif dataset is not None and not dataset.draw_logprobs:
        has = {"", "draws"}
    found: dict[str, Better | None] = {"loss": "lower"}
    for name, field in EvaluationReport.model_fields.items():
        record = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else _better(None)
        if name != "calibration" and record["needs"] in has:
            found[name] = _DIRECTIONS[record["better"]]
    return found


_SUMMED = tuple(
    name
    for name in EvaluationReport.model_fields
    if name not in {"targets", "perplexity", "forward_kl_estimate_error", "expected_calibration_error", "calibration"}
)
"""Figures that are summed; the others are computed from the sums."""


class EvaluationSums:
    """Sums of figures over positions, in one tensor that processes can add up.

    `tensor float64 [3, figures + 15]`: per figure the positions that have it, its sum and the sum of its squares; then
    per calibration bin the positions, confidences and hits.
    """

    def __init__(self) -> None:
        self.tensor = torch.zeros(3, len(_SUMMED) + BINS, dtype=torch.float64)

    @property
    def targets(self) -> int:
        """Positions so far."""
        return int(self.tensor[0, _SUMMED.index("cross_entropy")])

    def add(self, figures: Figures) -> None:
        """Add the figures `[M]` of some positions."""
        # Gathered on the figures' device: one synchronization with a GPU per call.
        moments = torch.zeros_like(self.tensor, device=figures["confidence"].device)
        for name, values in figures.items():
            moments[:, _SUMMED.index(name)] = torch.stack([torch.ones_like(values), values, values.square()]).sum(1)
        moments[:, len(_SUMMED) :] = bin_sums(figures["confidence"], figures["accuracy"])
        self.tensor += moments.to(self.tensor.device)

    def report(self) -> EvaluationReport:
        """The means over all positions; at least one was added."""
        moments, bins = self.tensor.split([len(_SUMMED), BINS], dim=1)
        counts, sums, squares = moments.tolist()
        # A figure that some batches lack is omitted: its mean would cover the other batches only.
        whole = {name: count == self.targets for name, count in zip(_SUMMED, counts, strict=True)}
        means = {name: total / self.targets for name, total in zip(_SUMMED, sums, strict=True) if whole[name]}
        tail = _SUMMED.index("tail_kl_estimate")
        return EvaluationReport(
            targets=self.targets,
            perplexity=_exp(means["cross_entropy"]),
            forward_kl_estimate_error=_standard_error(self.targets, sums[tail], squares[tail])
            if "tail_kl_estimate" in means
            else None,
            expected_calibration_error=expected_calibration_error(bins),
            calibration=calibration_bins(bins),
            **means,
        )


def bin_sums(confidence: torch.Tensor, hit: torch.Tensor) -> torch.Tensor:
    """`float64 [3, 15]`: positions, summed confidence and hits per bin, from `confidence, hit float64 [M]`."""
    place = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    weights = torch.stack([torch.ones_like(confidence), confidence, hit])
    return weights.new_zeros(3, BINS).index_add_(1, place, weights)


def expected_calibration_error(sums: torch.Tensor) -> float:
    """The expected calibration error, from the sum of all `bin_sums`."""
    counts, confidence, hits = sums
    return ((hits - confidence).abs().sum() / counts.sum()).item()


def calibration_bins(sums: torch.Tensor) -> tuple[CalibrationBin, ...]:
    """The bins of a reliability diagram, from the sum of all `bin_sums`."""
    return tuple(
        CalibrationBin(
            above=b / BINS,
            up_to=(b + 1) / BINS,
            targets=int(count),
            confidence=confidence / count if count else None,
            accuracy=hits / count if count else None,
        )
        for b, (count, confidence, hits) in enumerate(sums.T.tolist())
    )


def _exp(value: float) -> float:
    # `math.exp` raises OverflowError where float64 overflows.
    return math.exp(value) if value < 700 else math.inf


def _standard_error(count: int, total: float, squares: float) -> float | None:
    """Standard error of the mean of `count` values; None for fewer than two."""
    if count < 2:
        return None
    return math.sqrt(max(squares - total * total / count, 0) / (count * (count - 1)))
