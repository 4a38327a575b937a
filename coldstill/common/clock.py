"""Durations and times of the clock in words."""

from __future__ import annotations

from datetime import datetime, timedelta

_FURTHEST_S = 100 * 366 * 86_400
"""A rate close to zero gives times beyond what a date can hold."""


def duration(seconds: float | None) -> str:
    """A time in words: its two largest units of days, hours, minutes and seconds."""
    if seconds is None or not abs(seconds) <= _FURTHEST_S:
        return "not known yet"
    left = max(0, round(seconds))
    parts: list[str] = []
    for size, name in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count or parts or size == 1:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def local_now() -> datetime:
    """The time of the clock on this machine, with its zone."""
    return datetime.now().astimezone()


def ends_about(seconds: float | None, *, now: datetime) -> str:
    """The time `seconds` after `now`, to the minute, such as `about 14:32 today`. `now` is local."""
    if seconds is None or not 0 <= seconds <= _FURTHEST_S:
        return "not known yet"
    return f"about {clock_time(now + timedelta(seconds=seconds), now=now)}"


def clock_time(then: datetime, *, now: datetime) -> str:
    """`then` to the minute, with the day as seen from `now`: `14:32 today`, `02:10 on Dec 3`, or with the year."""
    days = (then.date() - now.date()).days
    near = {-1: "yesterday", 0: "today", 1: "tomorrow"}.get(days)
    if near is None:
        near = f"on {then:%b} {then.day}" + (f", {then.year}" if then.year != now.year else "")
    return f"{then:%H:%M} {near}"


def clock_time_of(moment: float | None, *, now: datetime) -> str | None:
    """The clock time of a Unix time; None for none, and for one that no date can hold."""
    if moment is None or not abs(moment - now.timestamp()) <= _FURTHEST_S:
        return None
    return clock_time(datetime.fromtimestamp(moment, now.tzinfo), now=now)
