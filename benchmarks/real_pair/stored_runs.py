"""Adds the runs of the stored result of a real pair to those of an output folder."""

from __future__ import annotations

from typing import Any

from benchmarks.common.report import stored
from benchmarks.common.run_log import append
from benchmarks.real_pair.plan import LOG, read_log, run_of, settings
from benchmarks.real_pair.runs import Bench
from coldstill.common.files import read_json

VARYING = ("teacher_on_test", "bytes_per_target")
"""Facts in the last digits of which machines differ."""


def take_stored(bench: Bench) -> None:
    """Add those runs of the stored result to the log that it does not have yet.

    Raises `ValueError` if that result has other settings, or another cache or held-out part: its runs would not be
    comparable with those of this folder.
    """
    result = read_json(stored("real_pair"))
    check_same("settings", settings(bench.size), result)
    check_same("facts", bench.facts(), result)
    log, done = bench.output / LOG, read_log(bench.output / LOG)
    append(log, *(record for record in result["log"] if run_of(record) not in done))


def check_same(name: str, ours: dict[str, Any], result: dict[str, Any]) -> None:
    """Raise `ValueError` if the part `name` of the stored result is not ours."""
    theirs = result[name]
    if differing := sorted(key for key in ours if theirs.get(key) != ours[key] and key not in VARYING):
        values = ", ".join(f"{key}: {theirs.get(key)!r} there, {ours[key]!r} here" for key in differing)
        raise ValueError(f"the stored result's {name} differ ({values}); start without --stored")
