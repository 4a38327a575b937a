"""Expected calibration error: confidences and hits come in bin by bin, one number and its bins go out.

Definition of Guo et al. 2017 (arXiv 1706.04599, equations 2 to 5): confidences are put into 15 bins of equal width,
`((b - 1) / 15, b / 15]`; the error is the mean over all positions of |accuracy - confidence| of their bin.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field

BINS = 15


class CalibrationBin(BaseModel):
    """Positions whose most probable token had a probability above `above` and at most `up_to`."""

    model_config = ConfigDict(frozen=True)

    above: float
    up_to: float
    targets: int
    confidence: float | None = Field(description="Mean probability of the most probable token; None where empty.")
    accuracy: float | None = Field(description="How often it was the label; None where empty.")


def bin_sums(confidence: torch.Tensor, hit: torch.Tensor) -> torch.Tensor:
    """`float64 [3, 15]`: positions, summed confidence and hits of each bin, from `confidence, hit float64 [M]`."""
    place = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    weights = torch.stack([torch.ones_like(confidence), confidence, hit])
    return weights.new_zeros(3, BINS).index_add_(1, place, weights)


def expected_calibration_error(sums: torch.Tensor) -> float:
    """The error of summed `bin_sums`."""
    counts, confidence, hits = sums
    return ((hits - confidence).abs().sum() / counts.sum()).item()


def calibration_bins(sums: torch.Tensor) -> tuple[CalibrationBin, ...]:
    """The bins of summed `bin_sums`, for a reliability diagram."""
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
