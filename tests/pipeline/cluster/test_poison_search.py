"""Laws of the search for poison rows, against a simulated worker that dies by rule. The trials are the only state."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstill.pipeline.cluster.attempts import (
    Attempts,
    AttemptStore,
    CrashReport,
    Trial,
    read_crash_report,
    write_crash_report,
)
from coldstill.pipeline.cluster.poison_search import MAX_DEATHS, next_task
from coldstill.pipeline.worker import UnitTask
from coldstill.storage_schema.store import Store

FIRST = 1000
KILLED = CrashReport(cause="its worker died", reason="killed")
MEMORY = CrashReport(cause="out of memory", reason="CUDA out of memory", out_of_memory=True)

Rule = Callable[[Collection[int]], CrashReport | None]


def _calls(task: UnitTask) -> list[list[int]]:
    """The source rows of each call of the teacher that a task makes."""
    excluded = {row.source_row for row in task.excluded}
    parts = task.parts or ((task.start, task.stop),)
    return [[row for row in range(*part) if row not in excluded] for part in parts]


def _play(rows: int, dies: Rule, *, max_attempts: int = 2, accidents: Collection[int] = ()) -> tuple[Attempts, list]:
    """All trials of a unit until it is committed or given up (None), each by a driver that has just started.

    Trial number `i` dies in any case where `i` is among the accidents.
    """
    attempts, tasks = Attempts(unit=0), []
    while True:
        attempts = Attempts.model_validate_json(attempts.model_dump_json())
        task = next_task(attempts, first_row=FIRST, rows=rows, max_attempts=max_attempts)
        tasks.append(task)
        if task is None:
            return attempts, tasks
        died_of = next((crash for call in _calls(task) if (crash := dies(call))), None)
        if len(attempts.trials) in accidents:
            died_of = KILLED
        if died_of is None and task.kind != "probe":
            return attempts, tasks
        trial = Trial(
            kind=task.kind, start=task.start, stop=task.stop, worker="worker-0", isolated=True, died_of=died_of
        )
        attempts = Attempts(unit=0, trials=(*attempts.trials, trial))


def _poisoned_by(poison: Collection[int]) -> Rule:
    return lambda rows: KILLED if set(poison) & set(rows) else None


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 70), st.integers(1, 3))
def test_exactly_the_poison_rows_are_excluded(data: st.DataObject, rows: int, max_attempts: int) -> None:
    poison = data.draw(st.sets(st.integers(FIRST, FIRST + rows - 1), max_size=4))
    _, tasks = _play(rows, _poisoned_by(poison), max_attempts=max_attempts)
    assert {row.source_row for row in tasks[-1].excluded} == poison
    assert tasks[-1].kind == ("rest" if poison else "whole")
    assert tasks[-1].parts == ()


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 40))
def test_a_healthy_row_is_not_excluded_by_fewer_accidents_than_max_attempts(data: st.DataObject, rows: int) -> None:
    poison = data.draw(st.sets(st.integers(FIRST, FIRST + rows - 1), max_size=2))
    accident = data.draw(st.integers(0, 30))
    _, tasks = _play(rows, _poisoned_by(poison), accidents={accident})
    assert {row.source_row for row in tasks[-1].excluded} == poison


def test_a_unit_with_accidents_runs_as_planned() -> None:
    """Two spot machines are taken away while it runs: the search finds no poison, and its bytes do not change."""
    _, tasks = _play(8, _poisoned_by(()), accidents={0, 1})
    assert [task.kind for task in tasks] == ["whole", "whole", "probe", "probe", "rest"]
    assert tasks[-1].excluded == tasks[-1].parts == ()


@pytest.mark.parametrize("crash", [MEMORY, KILLED])
@pytest.mark.parametrize("limit", [1, 3, 8, 15])
def test_rows_that_kill_only_together_are_committed_in_parts(crash: CrashReport, limit: int) -> None:
    """After an out-of-memory error of the engine, no worker is spent on the same task again."""
    attempts, tasks = _play(16, lambda rows: crash if len(rows) > limit else None)
    assert tasks[-1].kind == "parts"
    assert tasks[-1].excluded == ()
    assert sorted(row for call in _calls(tasks[-1]) for row in call) == list(range(FIRST, FIRST + 16))
    assert all(len(call) <= limit for call in _calls(tasks[-1]))
    whole = [trial for trial in attempts.trials if trial.kind in ("whole", "rest")]
    assert len(whole) == (1 if crash is MEMORY else 4)


def test_one_poison_row_among_1024_costs_few_workers() -> None:
    attempts, _ = _play(1024, _poisoned_by({FIRST + 700}))
    deaths = [trial for trial in attempts.trials if trial.died_of]
    assert len(deaths) == 2 + 9 + 2  # the whole unit, 9 halvings, the single row


def test_a_unit_that_dies_in_every_way_is_given_up() -> None:
    attempts, tasks = _play(4096, lambda rows: KILLED)
    assert tasks[-1] is None
    assert len(attempts.trials) == MAX_DEATHS
    assert _play(1, _poisoned_by({FIRST}))[1][-1].excluded, "a unit of one poison row is committed without it"
    kinds = ("whole", "rest") * 2
    spent = (Trial(kind=kind, start=0, stop=1, worker="w", isolated=True, died_of=KILLED) for kind in kinds)
    lived = Trial(kind="probe", start=0, stop=1, worker="w", isolated=True)
    assert next_task(Attempts(unit=0, trials=(*spent, lived)), first_row=0, rows=1, max_attempts=2) is None


def test_deaths_beside_another_unit_prove_nothing() -> None:
    shared = Trial(kind="whole", start=FIRST, stop=FIRST + 8, worker="w", isolated=False, died_of=KILLED)
    task = next_task(Attempts(unit=0, trials=(shared,) * 5), first_row=FIRST, rows=8, max_attempts=2)
    assert task is not None
    assert task.kind == "whole"


def test_attempts_and_crash_reports_are_read_back_and_damaged_ones_begin_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    all_attempts = AttemptStore(store)
    attempts, _ = _play(8, _poisoned_by({FIRST + 3}))
    assert all_attempts.units() == set()
    all_attempts.write(attempts)
    write_crash_report(store, "abc-worker-0", MEMORY)
    assert all_attempts.read(0) == attempts
    assert all_attempts.read(1) == Attempts(unit=1)
    assert all_attempts.units() == {0}
    assert read_crash_report(store, "abc-worker-0") == MEMORY
    assert read_crash_report(store, "abc-worker-1") is None
    store.put("attempts/000000.json", b"{")
    assert all_attempts.units() == {0}, "the unit stays a suspect"
    assert all_attempts.read(0) == Attempts(unit=0)
    write_crash_report(store, "abc-worker-2", MEMORY)
    store.put("_run/last_words/abc-worker-2.json", b"\xff")
    assert read_crash_report(store, "abc-worker-2") is None
