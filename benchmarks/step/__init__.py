"""Time and memory of a whole training step."""

from __future__ import annotations

SIDES = PLAIN, FUSED, CACHED, RESIDENT = ("plain, Trainer", "plain, fused", "TAID, cache", "TAID, teacher resident")
