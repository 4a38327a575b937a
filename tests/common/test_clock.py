"""Durations and clock times in words."""

from __future__ import annotations

from datetime import datetime

import pytest

from coldstill.common.clock import clock_time, ends_about, moment

NOW = datetime(2026, 12, 30, 23, 50, 40)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "about 23:50 today"),
        (600, "about 00:00 tomorrow"),
        (86_400 * 1.5, "about 11:50 on Jan 1, 2027"),
        (None, "not known yet"),
        (1e300, "not known yet"),
        (float("nan"), "not known yet"),
    ],
)
def test_the_end_is_a_time_of_the_clock_with_its_day(seconds: float | None, words: str) -> None:
    assert ends_about(seconds, now=NOW) == words


def test_a_day_of_this_year_needs_no_year() -> None:
    assert clock_time(datetime(2026, 12, 3, 2, 10), now=NOW) == "02:10 on Dec 3"
    assert clock_time(datetime(2026, 12, 29, 2, 10), now=NOW) == "02:10 yesterday"


@pytest.mark.parametrize("unix_s", [None, float("nan"), float("inf"), 1e300, -1e18])
def test_a_moment_that_no_date_holds_has_no_time(unix_s: float | None) -> None:
    assert moment(unix_s) is None
    assert moment(NOW.timestamp()) == "2026-12-30 23:50"
