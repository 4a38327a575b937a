"""What an evaluation found: sums of figures per position come in, an `EvaluationReport` goes out.

All logs are natural, all divergences and entropies in nats per target, all masses and rates between 0 and 1. `p` is the
teacher, `q` the student; the head of a position is the teacher's 10 most probable ids, as far as the cache keeps them.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field

from coldstill.common.models import FrozenModel

from .calibration import BINS, CalibrationBin, bin_sums, calibration_bins, expected_calibration_error
from .figures import Figures


class EvaluationReport(FrozenModel):
    """Means over the target positions of an evaluation. What could not be measured is None."""

    targets: int = Field(description="Target positions.")
    cross_entropy: float = Field(description="-log q of the label.")
    perplexity: float = Field(description="exp of the cross-entropy.")
    teacher_cross_entropy: float = Field(description="-log p of the label, from the cache.")
    forward_kl_lower_bound: float = Field(
        description="KL(p || q) over the K kept ids and one symbol for all others: below the dense KL. The mean of the "
        "training log's bucket_kl."
    )
    reverse_kl_lower_bound: float = Field(description="KL(q || p) over the same symbols: below the dense KL.")
    forward_kl_estimate: float | None = Field(
        default=None, description="KL(p || q) over all ids, from the cache: unbiased, by draws with log-probs."
    )
    forward_kl_estimate_error: float | None = Field(
        default=None,
        description="Standard error of it, if the draws were its only noise: at most this much, as the spread of the "
        "true values is in it too.",
    )
    tail_kl_estimate: float | None = Field(
        default=None, description="Its part that the lower bound leaves out: how the tail is spread. May be below 0."
    )
    soft_cross_entropy_estimate: float | None = Field(
        default=None,
        description="-sum p log q over all ids, unbiased, by draws. It is KL(p || q) plus the teacher's entropy, which "
        "is the same for all students: it ranks them where the draws have no log-probs.",
    )
    forward_kl: float | None = Field(default=None, description="KL(p || q) over all ids; needs the resident teacher.")
    reverse_kl: float | None = Field(default=None, description="KL(q || p) over all ids; needs the resident teacher.")
    cached_teacher_kl: float | None = Field(
        default=None,
        description="KL over the K+1 symbols from the cache to the resident teacher: about what storage costs where it "
        "is the teacher of the dataset. Much more means another teacher, precision or alignment.",
    )
    top1_agreement: float = Field(description="How often both have the same most probable token.")
    accuracy: float = Field(description="How often the student's most probable token is the label.")
    confidence: float = Field(description="The student's probability of its most probable token.")
    expected_calibration_error: float = Field(
        description=f"Of the student against the labels, {BINS} bins of equal width (Guo et al. 2017)."
    )
    head_mass: float = Field(description="The student's mass on the head (TAID, table 3).")
    rest_mass: float = Field(description="The student's mass on all other ids.")
    tail_mass: float = Field(description="The student's mass outside the kept ids.")
    teacher_head_mass: float = Field(description="The teacher's mass on the head.")
    teacher_tail_mass: float = Field(description="The teacher's mass outside the kept ids.")
    last_fifth_mass: float | None = Field(
        default=None,
        description="The student's mass on the 80th to 100th percentile of the ids as the resident teacher ranks them "
        "(TAID, table 3).",
    )
    teacher_last_fifth_mass: float | None = Field(default=None, description="The teacher's mass on them.")
    calibration: tuple[CalibrationBin, ...] = Field(description="The bins of the calibration error.")

    def metrics(self) -> dict[str, float]:
        """All numbers that were measured, by name."""
        return self.model_dump(exclude_none=True, exclude={"calibration"})


_SUMMED = tuple(
    name
    for name in EvaluationReport.model_fields
    if name not in {"targets", "perplexity", "forward_kl_estimate_error", "expected_calibration_error", "calibration"}
)
"""Figures that are added up; the others follow from them."""


class EvaluationSums:
    """Sums of figures over positions, in float64; equal whatever batches they came in.

    `tensor float64 [3, figures + 15]` holds all there is, so that processes can add theirs up: how many positions had
    a figure, its sum and the sum of its squares; then positions, confidence and hits of the calibration bins.
    """

    def __init__(self) -> None:
        self.tensor = torch.zeros(3, len(_SUMMED) + BINS, dtype=torch.float64)

    @property
    def targets(self) -> int:
        """Positions so far."""
        return int(self.tensor[0, _SUMMED.index("cross_entropy")])

    def add(self, figures: Figures) -> None:
        """Take figures `[M]`."""
        # Put together where they are, so that a GPU is waited for once.
        moments = torch.zeros_like(self.tensor, device=figures["confidence"].device)
        for name, values in figures.items():
            moments[:, _SUMMED.index(name)] = torch.stack([torch.ones_like(values), values, values.square()]).sum(1)
        moments[:, len(_SUMMED) :] = bin_sums(figures["confidence"], figures["accuracy"])
        self.tensor += moments.to(self.tensor.device)

    def report(self) -> EvaluationReport:
        """Means over all positions; there must be one."""
        moments, bins = self.tensor.split([len(_SUMMED), BINS], dim=1)
        counts, sums, squares = moments.tolist()
        # A figure that some batches lack is none: its mean would be that of the others.
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


def _exp(value: float) -> float:
    # Past this it is infinite for float64, which `math.exp` calls an error.
    return math.exp(value) if value < 700 else math.inf


def _standard_error(count: int, total: float, squares: float) -> float | None:
    """Of the mean of `count` values; None for fewer than two."""
    if count < 2:
        return None
    return math.sqrt(max(squares - total * total / count, 0) / (count * (count - 1)))
