"""Compares the targets of two engines, or of two runs of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coldstill.storage_schema.rows import TeacherTargets

TOLERANCE = 1e-5  # in log-prob, float32 on both sides
FIELDS = ("ids", "logprobs", "counts", "log_tail", "label_logprob", "draw_ids", "draw_counts", "draw_logprobs")


def assert_same(some: Sequence[TeacherTargets], others: Sequence[TeacherTargets]) -> None:
    """Equal but for the rounding of float32."""
    assert len(some) == len(others)
    drawn = same = 0
    for one, other in zip(some, others, strict=True):
        one, other = one.by_probability(), other.by_probability()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(one.label_logprob, other.label_logprob, atol=TOLERANCE)
        np.testing.assert_allclose(one.log_tail, other.log_tail, atol=TOLERANCE)
        if one.draw_ids.size == other.draw_ids.size:
            same += int((one.draw_ids == other.draw_ids).sum())
        drawn += other.draw_ids.size
    assert same >= 0.98 * drawn  # a draw differs only where the cumulative sum passes its uniform by rounding


def assert_equal(some: Sequence[TeacherTargets], others: Sequence[TeacherTargets]) -> None:
    """Equal bit for bit."""
    for one, other in zip(some, others, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
