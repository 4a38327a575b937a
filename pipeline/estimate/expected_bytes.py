"""What a target will take on disk, before a teacher was asked: settings in, the least and the most bytes out.

The figures are the codec's own benchmark: `benchmarks/results/codec_2_cores.json`, sides "ours", of its two teachers, a
sharp and a flat one (mean entropies 1.2 and 4.4 nats, vocabulary 8,192). A vocabulary of more than 65,536 ids takes a
few bytes more. Values between the measured K lie on straight lines.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coldstill.pipeline.config import CaptureConfig

TOP_KS = (16, 32, 64, 128)
FLOOR = 1e-4
DRAWS = 64
BYTES_PER_TARGET = {
    ("fine", False, "sharp"): (30.8, 54.5, 98.6, 182.1),
    ("fine", False, "flat"): (30.1, 54.3, 102.1, 193.4),
    ("fine", True, "sharp"): (25.6, 38.8, 57.1, 76.8),
    ("fine", True, "flat"): (30.0, 53.2, 97.3, 176.3),
    ("coarse", False, "sharp"): (27.7, 50.2, 90.8, 169.7),
    ("coarse", False, "flat"): (26.7, 48.7, 90.3, 171.5),
    ("coarse", True, "sharp"): (22.5, 34.8, 51.0, 68.5),
    ("coarse", True, "flat"): (26.6, 47.6, 86.0, 155.8),
    ("exact", False, "sharp"): (47.6, 91.7, 179.6, 357.1),
    ("exact", False, "flat"): (45.9, 89.2, 176.7, 352.8),
}
"""By fidelity, whether ids below the floor of 1e-4 are left out, and teacher; at each of `TOP_KS`, without draws."""
BYTES_OF_DRAWS = {"sharp": (4.5, 3.0, 1.9, 1.1), "flat": (30.6, 29.2, 27.3, 24.7)}
"""What the tail's share of 64 draws adds."""
RANKED = 0.92
"""With an id rank table."""
BYTES_PER_TOKEN = 1.5
"""Of the row itself, without its metadata."""


class Bounds(NamedTuple):
    """The least and the most, of a sharp and of a flat teacher."""

    least: float
    most: float


def bytes_per_target(config: CaptureConfig) -> Bounds:
    """Of the teacher's word alone; tokens come to it (`BYTES_PER_TOKEN`)."""
    values = sorted(_bytes(config, temperament) for temperament in ("sharp", "flat"))
    return Bounds(*values)


def _bytes(config: CaptureConfig, temperament: str) -> float:
    teacher = config.teacher
    has_floor = teacher.min_prob >= FLOOR and config.fidelity != "exact"
    entries = _at(BYTES_PER_TARGET[config.fidelity, has_floor, temperament], teacher.top_k)
    draws = _at(BYTES_OF_DRAWS[temperament], teacher.top_k) * min(teacher.draws, 2 * teacher.kept_draws) / DRAWS
    logprobs = 2 * draws if teacher.draw_logprobs else 0.0
    return (RANKED if config.pilot_targets and config.fidelity != "exact" else 1.0) * entries + draws + logprobs


def _at(values: tuple[float, ...], top_k: int) -> float:
    """On the line through the measured points; beyond the last in proportion."""
    if top_k > TOP_KS[-1]:
        return values[-1] * top_k / TOP_KS[-1]
    return float(np.interp(top_k, TOP_KS, values)) if top_k >= TOP_KS[0] else values[0] * top_k / TOP_KS[0]
