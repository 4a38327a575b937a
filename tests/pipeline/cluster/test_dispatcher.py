"""Laws of the dispatcher, with workers that die by rule and without Ray."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest

from coldstill.common.errors import ColdstillError
from coldstill.common.processor import ProcessorUnusable
from coldstill.pipeline.cluster.attempts import Attempts, AttemptStore, CrashReport, Trial
from coldstill.pipeline.cluster.dispatcher import Dispatcher, WorkerHandle, names_by_unit
from coldstill.pipeline.cluster.poison_search import MAX_DEATHS
from coldstill.pipeline.errors import ImageHostFailed, SourceAdapterFailed, TeacherOutputInvalid, UnitFailed
from coldstill.pipeline.worker import UnitTask
from coldstill.storage_schema.errors import StorageFailed, StorageFull, TooManyMedia
from coldstill.storage_schema.plan import Unit

ROWS = 8
KILLED = CrashReport(cause="its worker died", reason="killed")


class MemoryAttempts(AttemptStore):
    """Attempts in a dict, for thousands of units in no time."""

    def __init__(self, documents: dict[int, Attempts]):
        self._documents = documents

    def read(self, unit: int) -> Attempts:
        return self._documents.get(unit, Attempts(unit=unit))

    def write(self, attempts: Attempts) -> None:
        self._documents[attempts.unit] = attempts

    def units(self) -> set[int]:
        return set(self._documents)


class Simulation:
    """Workers that die over the source rows for which `dies` is true, each replaced by a new one.

    `earlier`: attempts of an earlier run.
    """

    def __init__(self, units: int, *, workers: int, seed: int = 0, earlier: Mapping[int, Attempts] | None = None):
        self.documents = dict(earlier or {})
        attempts = MemoryAttempts(self.documents)
        plan = [Unit(unit, 0, unit * ROWS, ROWS) for unit in range(units)]
        self.dispatcher = Dispatcher(range(units), plan=plan, attempts=attempts, max_attempts=1)
        self.workers = [self._worker(number) for number in range(workers)]
        self.committed: dict[int, set[int]] = {}
        self.random = random.Random(seed)
        self.deaths = self.healthy_beside_a_suspect = 0

    def _worker(self, number: int) -> WorkerHandle:
        return WorkerHandle(f"worker-{number}", actor=None, crash_key="", is_ready=True)

    def play(self, dies: Callable[[int], bool]) -> None:
        """Run all units to their end."""
        while self.dispatcher.unfinished:
            for worker, task in self.dispatcher.assign(self.workers):
                worker.tasks[object()] = task
                self._check_laws()
            if not self.dispatcher.unfinished:
                return  # the last one was given up
            worker = self.random.choice([worker for worker in self.workers if worker.tasks])
            reference, task = self.random.choice(list(worker.tasks.items()))
            self._end(worker, reference, task, dies)

    def _end(self, worker: WorkerHandle, reference: object, task: UnitTask, dies: Callable[[int], bool]) -> None:
        rows = set(range(task.start, task.stop)) - {row.source_row for row in task.excluded}
        if any(map(dies, rows)):
            self.deaths += 1
            lost = list(worker.tasks.values())
            self.workers[self.workers.index(worker)] = self._worker(100 + self.deaths)
            self.dispatcher.died(lost, worker=worker, crash=KILLED)
            return
        del worker.tasks[reference]
        self.dispatcher.done(task, worker=worker)
        if task.kind != "probe":
            assert task.unit not in self.committed
            self.committed[task.unit] = rows

    def _check_laws(self) -> None:
        isolated = [worker for worker in self.workers if any(self._is_suspect(task) for task in worker.tasks.values())]
        assert all(len(worker.tasks) == 1 for worker in isolated), "a suspect is alone on its worker"
        assert all(len(worker.tasks) <= 2 for worker in self.workers)
        healthy = [task for worker in self.workers for task in worker.tasks.values() if not self._is_suspect(task)]
        self.healthy_beside_a_suspect += bool(isolated and healthy)

    def _is_suspect(self, task: UnitTask) -> bool:
        return task.unit in self.documents


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_only_poison_rows_are_lost_for_any_workers_and_any_order_of_events(seed: int, workers: int) -> None:
    chance = random.Random(seed)
    poison = {chance.randrange(3 * ROWS, 40 * ROWS) for _ in range(5)}
    simulation = Simulation(40, workers=workers, seed=seed)
    simulation.play(poison.__contains__)
    assert simulation.dispatcher.failed == []
    kept = set().union(*simulation.committed.values())
    assert kept == set(range(40 * ROWS)) - poison
    assert workers == 1 or simulation.healthy_beside_a_suspect > 0


def test_one_worker_runs_the_healthy_units_before_it_searches() -> None:
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
    with pytest.raises(UnitFailed, match="each of the first units killed its worker"):
        simulation.play(lambda row: True)
    assert simulation.deaths <= 3 * (workers + 2)


def test_a_named_error_fails_one_unit_but_the_first_three_or_a_store_error_end_the_run() -> None:
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


@pytest.mark.parametrize("error", [SourceAdapterFailed, ImageHostFailed, ProcessorUnusable, TooManyMedia])
def test_what_is_not_one_units_own_ends_the_run(error: type[ColdstillError]) -> None:
    """At any unit: the user corrects the function, or waits for the host, and committed units are kept."""
    simulation = Simulation(9, workers=1)
    (worker, first), (_, second), *_ = simulation.dispatcher.assign(simulation.workers)
    simulation.dispatcher.done(first, worker=worker)
    with pytest.raises(error, match="row 7"):
        simulation.dispatcher.raised(second, error("row 7"))


def test_the_reason_of_a_unit_that_was_given_up_names_the_file_to_delete() -> None:
    trial = Trial(kind="whole", start=0, stop=ROWS, worker="worker-0", isolated=False, died_of=KILLED)
    simulation = Simulation(1, workers=1, earlier={0: Attempts(unit=0, trials=(trial,) * MAX_DEATHS)})
    simulation.play(lambda row: True)
    (failed,) = simulation.dispatcher.failed
    assert f"{MAX_DEATHS} workers died while they ran it" in failed.reason
    assert "delete attempts/000000.json" in failed.reason


def test_names_by_unit_gives_the_worker_of_each_unit() -> None:
    worker = WorkerHandle("worker-7", actor=None, crash_key="")
    worker.tasks[object()] = UnitTask(unit=3, kind="whole", start=0, stop=1)
    assert names_by_unit([worker]) == {3: "worker-7"}
