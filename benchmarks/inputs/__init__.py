"""Texts and models that several benchmarks read."""

from __future__ import annotations

from pathlib import Path

CACHE = Path(__file__).parents[2] / ".bench_cache"
"""Models and distributions, which the first run makes and later runs read."""
