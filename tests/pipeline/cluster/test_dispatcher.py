"""Laws of who gets which unit, with workers that die by rule; no Ray, and thousands of units in no time."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Set as AbstractSet

import pytest

from coldstill.pipeline.cluster.dispatcher import AttemptBook, Dispatcher, Worker, names_by_unit
from coldstill.pipeline.errors import TeacherOutputInvalid, UnitFailed
from coldstill.pipeline.units.attempts import Attempts, LastWords, Trial
from coldstill.pipeline.units.bisection import MOST_DEATHS, UnitTask
from coldstill.storage_schema.errors import StorageFailed, StorageFull
from coldstill.storage_schema.plan import Unit

ROWS = 8
KILLED = LastWords(cause="its worker died", reason="killed")


class Simulation:
    """Workers that die over source rows that `dies` names, each with a new one in its place."""

    def __init__(self, units: int, *, workers: int, seed: int = 0, known_suspects: AbstractSet[int] = frozenset()):
        self.documents: dict[int, Attempts] = {}
        book = AttemptBook(
            lambda unit: self.documents.get(unit, Attempts(unit=unit)),
            lambda document: self.documents.update({document.unit: document}),
        )
        plan = [Unit(unit, 0, unit * ROWS, ROWS) for unit in range(units)]
        self.dispatcher = Dispatcher(range(units), known_suspects=known_suspects, plan=plan, book=book, attempts=1)
        self.workers = [self._worker(number) for number in range(workers)]
        self.committed: dict[int, set[int]] = {}
        self.random = random.Random(seed)
        self.deaths = self.healthy_beside_a_suspect = 0

    def _worker(self, number: int) -> Worker:
        return Worker(f"worker-{number}", actor=None, key="", is_ready=True)

    def play(self, dies: Callable[[int], bool]) -> None:
        """All units to their end."""
        while self.dispatcher.unfinished:
            for worker, task in self.dispatcher.assign(self.workers):
                worker.tasks[object()] = task
                self._hold_the_laws()
            if not self.dispatcher.unfinished:
                return  # the last one was given up
            worker = self.random.choice([worker for worker in self.workers if worker.tasks])
            reference, task = self.random.choice(list(worker.tasks.items()))
            self._end(worker, reference, task, dies)

    def _end(self, worker: Worker, reference: object, task: UnitTask, dies: Callable[[int], bool]) -> None:
        rows = set(range(task.start, task.stop)) - {row.source_row for row in task.excluded}
        if any(map(dies, rows)):
            self.deaths += 1
            lost = list(worker.tasks.values())
            self.workers[self.workers.index(worker)] = self._worker(100 + self.deaths)
            self.dispatcher.died(lost, worker=worker, words=KILLED)
            return
        del worker.tasks[reference]
        self.dispatcher.done(task, worker=worker)
        if task.kind != "probe":
            assert task.unit not in self.committed
            self.committed[task.unit] = rows

    def _hold_the_laws(self) -> None:
        lone = [worker for worker in self.workers if any(self._is_suspect(task) for task in worker.tasks.values())]
        assert all(len(worker.tasks) == 1 for worker in lone), "a suspect is alone on its worker"
        assert all(len(worker.tasks) <= 2 for worker in self.workers)
        healthy = [task for worker in self.workers for task in worker.tasks.values() if not self._is_suspect(task)]
        self.healthy_beside_a_suspect += bool(lone and healthy)

    def _is_suspect(self, task: UnitTask) -> bool:
        return task.unit in self.documents


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_only_deadly_rows_are_lost_whatever_the_workers_and_the_order_of_events(seed: int, workers: int) -> None:
    chance = random.Random(seed)
    deadly = {chance.randrange(3 * ROWS, 40 * ROWS) for _ in range(5)}
    simulation = Simulation(40, workers=workers, seed=seed)
    simulation.play(deadly.__contains__)
    assert simulation.dispatcher.failed == []
    kept = set().union(*simulation.committed.values())
    assert kept == set(range(40 * ROWS)) - deadly
    assert workers == 1 or simulation.healthy_beside_a_suspect > 0


def test_one_worker_does_the_healthy_units_before_it_searches() -> None:
    simulation = Simulation(30, workers=1)
    simulation.play({0}.__contains__)
    probed = [
        unit for unit, document in simulation.documents.items() if any(t.kind == "probe" for t in document.trials)
    ]
    assert probed == [0]
    assert list(simulation.committed)[-1] == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_an_engine_that_every_unit_kills_ends_the_run_after_few_workers(workers: int) -> None:
    simulation = Simulation(1000, workers=workers)
    with pytest.raises(UnitFailed, match="the first units all end their workers"):
        simulation.play(lambda row: True)
    assert simulation.deaths <= 3 * (workers + 2)


def test_a_unit_with_a_named_error_fails_alone_but_three_at_first_or_a_store_end_the_run() -> None:
    task = UnitTask(unit=0, kind="whole", start=0, stop=ROWS)
    error = TeacherOutputInvalid("the teacher", found="NaN")
    simulation = Simulation(10, workers=1)
    simulation.dispatcher.done(UnitTask(unit=9, kind="whole", start=72, stop=80), worker=simulation.workers[0])
    for unit in range(5):
        simulation.dispatcher.raised(UnitTask(unit=unit, kind="whole", start=0, stop=ROWS), error)
    assert [failed.unit for failed in simulation.dispatcher.failed] == [0, 1, 2, 3, 4]
    with pytest.raises(StorageFailed, match="the disk"):
        simulation.dispatcher.raised(task, StorageFull("the disk"))
    simulation = Simulation(10, workers=1)
    simulation.dispatcher.raised(task, error)
    simulation.dispatcher.raised(UnitTask(unit=1, kind="whole", start=0, stop=ROWS), error)
    with pytest.raises(TeacherOutputInvalid):
        simulation.dispatcher.raised(UnitTask(unit=2, kind="whole", start=0, stop=ROWS), error)


def test_a_unit_that_is_given_up_says_how_to_try_it_anew() -> None:
    simulation = Simulation(1, workers=1, known_suspects={0})
    trial = Trial(kind="whole", start=0, stop=ROWS, worker="worker-0", alone=False, died_of=KILLED)
    simulation.documents[0] = Attempts(unit=0, trials=(trial,) * MOST_DEATHS)
    simulation.play(lambda row: True)
    (failed,) = simulation.dispatcher.failed
    assert f"{MOST_DEATHS} workers died over it" in failed.reason
    assert "remove attempts/000000.json" in failed.reason


def test_who_has_which_unit() -> None:
    worker = Worker("worker-7", actor=None, key="")
    worker.tasks[object()] = UnitTask(unit=3, kind="whole", start=0, stop=1)
    assert names_by_unit([worker]) == {3: "worker-7"}
