"""The losses by name: a checked `LossConfig` comes in, an `Objective` and (for TAID) its schedule go out."""

from __future__ import annotations

from .build import build_objective, build_schedule, memory_of
from .memory import LossMemory
from .objective import Objective
from .protocol import LossValues, SparseLoss, StudentView
from .schedule import TaidSchedule

__all__ = [
    "LossMemory",
    "LossValues",
    "Objective",
    "SparseLoss",
    "StudentView",
    "TaidSchedule",
    "build_objective",
    "build_schedule",
    "memory_of",
]
