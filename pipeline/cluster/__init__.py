"""Units over Ray actors: numbers of units in, their reports out. The only part of capture that imports Ray."""

from .dispatcher import FailedUnit
from .workforce import Workforce

__all__ = ["FailedUnit", "Workforce"]
