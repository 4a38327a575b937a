"""Laws of the companded grid, against its formula in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstill.storage_schema.codec.grid import Grid
from coldstill.storage_schema.header import MAX_TOP_K, Codec
from coldstill.storage_schema.rows import LOG_FLOOR

PRESETS = [Codec.preset(fidelity, top_k=top_k) for fidelity in ("fine", "coarse") for top_k in (1, 16, 64, MAX_TOP_K)]


def _level(a: int, b: int, logprob: float) -> int:
    x = min(-logprob, 60.0)
    return math.floor(a * (1 - math.exp(-x / 2)) + b * x + 0.5)


@given(a=st.integers(0, 1 << 15), b=st.integers(1, 256), logprob=st.floats(-100, 0))
def test_a_level_is_the_formula_s(a: int, b: int, logprob: float) -> None:
    x = min(-logprob, 60.0)
    if abs((a * (1 - math.exp(-x / 2)) + b * x + 0.5) % 1) > 1e-6:  # not between two levels
        assert Grid(a, b).levels(np.array([logprob]))[0] == _level(a, b, logprob)


@pytest.mark.parametrize("codec", PRESETS, ids=lambda codec: f"a={codec.a},b={codec.b}")
def test_every_level_reads_as_a_log_prob_that_is_written_as_that_level(codec: Codec) -> None:
    assert codec.a is not None
    assert codec.b is not None
    grid = Grid(codec.a, codec.b)
    levels = np.arange(grid.top + 1)
    np.testing.assert_array_equal(grid.levels(grid.logprobs), levels)
    assert (np.diff(grid.logprobs) < 0).all()
    assert grid.logprobs[0] == 0
    assert abs(grid.logprobs[-1] - LOG_FLOOR) < 1 / codec.b
    assert grid.top < 1 << 16


@pytest.mark.parametrize("codec", PRESETS, ids=lambda codec: f"a={codec.a},b={codec.b}")
def test_no_value_moves_by_more_than_a_step(codec: Codec) -> None:
    assert codec.a is not None
    assert codec.b is not None
    grid = Grid(codec.a, codec.b)
    values = np.linspace(LOG_FLOOR, 0, 20_001)
    moved = np.abs(grid.logprobs[grid.levels(values)] - values)
    assert (moved <= 0.5 * grid.step(values) * 1.2 + 1e-5).all()
    assert moved.max() <= 0.5 / codec.b + 1e-5


def test_what_is_below_the_floor_is_stored_as_the_floor() -> None:
    grid = Grid(96, 8)
    assert grid.levels(np.array([-np.inf, -1e9, LOG_FLOOR])).tolist() == [grid.top] * 3
