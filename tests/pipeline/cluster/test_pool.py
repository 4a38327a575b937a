"""Laws of the worker pool under faults: real Ray, processes, signals and commits; the teacher is a fake."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldstill.pipeline.cluster.attempts import AttemptStore
from coldstill.pipeline.cluster.pool import WorkerPool
from coldstill.pipeline.errors import TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.prepare import prepare
from coldstill.storage_schema.commits import committed_units, read_commit
from coldstill.storage_schema.errors import StorageFull
from coldstill.storage_schema.store import Store
from tests.conftest import SmallDisk
from tests.pipeline.capturing import contents

from .running import cluster_config, faults, rejects, run, unbroken


def _reasons(store: Store, unit: int) -> list[str]:
    return [trial.died_of.reason for trial in AttemptStore(store).read(unit).trials if trial.died_of]


@pytest.mark.slow
def test_sigkill_a_hang_and_a_lost_engine_process_cost_only_time(tmp_path: Path, ray_address: str) -> None:
    """The first units are healthy: a run whose first three units all fail ends."""
    config = cluster_config(tmp_path, ray_address, rows=59, cluster={"max_workers": 3, "hung_after_s": 3})
    trouble = faults(
        tmp_path, killed_once=("chat-33",), hangs_once=("chat-44",), loses_a_process_once=("chat-57",), seconds=0.2
    )
    outcome = run(config, trouble)
    assert sorted(outcome.reports) == [0, 1, 2, 3, 4, 5]
    assert outcome.failed == []
    assert contents(config.output) == unbroken(tmp_path, rows=59)
    store = Store(config.output)
    for unit, reason in ((3, "unexpectedly exits"), (4, "hung: no progress for"), (5, "of the engine is gone")):
        assert any(reason in found for found in _reasons(store, unit))


@pytest.mark.slow
def test_a_poison_row_is_found_and_rejected_and_a_named_error_fails_its_unit_alone(
    tmp_path: Path, ray_address: str
) -> None:
    config = cluster_config(tmp_path, ray_address, rows=7, rows_per_unit=2, max_attempts=1)
    outcome = run(config, faults(tmp_path, poison=("chat-3",), invalid=("chat-6",)))
    assert [failed.unit for failed in outcome.failed] == [3]
    assert "found:  NaN" in outcome.failed[0].reason
    assert [outcome.reports[unit].rows for unit in (0, 1, 2)] == [2, 1, 2]
    (found,) = rejects(config)
    assert (found["sample_id"], found["source_row"], found["reason"]) == ("chat-3", 3, "kills_the_engine")
    assert found["detail"] == "its worker died", "the same in every run"
    assert {row.source_row for row in AttemptStore(Store(config.output)).read(1).excluded} == {3}


@pytest.mark.slow
def test_two_poison_rows_of_a_unit_are_found_by_two_drivers_and_the_rest_of_it_is_saved(
    tmp_path: Path, ray_address: str
) -> None:
    """The first driver ends in the middle of the search, and the next one continues it."""
    config = cluster_config(tmp_path, ray_address, rows=18, rows_per_unit=6, max_attempts=1, cluster={"max_workers": 2})
    load = faults(tmp_path, poison=("chat-7", "chat-10"))
    units = [unit.index for unit in prepare(config).units]
    store = Store(config.output)
    with WorkerPool(config, load=load) as pool:
        for _ in pool.run_units(units):
            if any(trial.kind == "probe" for trial in AttemptStore(store).read(1).trials):
                break
    before = AttemptStore(store).read(1).trials
    outcome = run(config, load)
    assert outcome.failed == []
    after = AttemptStore(store).read(1)
    assert after.trials[: len(before)] == before
    assert {row.source_row for row in after.excluded} == {7, 10}
    found = {reject["sample_id"] for reject in rejects(config) if reject["reason"] == "kills_the_engine"}
    assert found == {"chat-7", "chat-10"}
    assert [read_commit(store, unit).rows for unit in range(3)] == [6, 4, 6]
    same = set(contents(config.output).values()) & set(unbroken(tmp_path, rows=18, rows_per_unit=6).values())
    assert len(same) == 3, "all units but the poisoned one have the bytes of an unbroken run"


@pytest.mark.slow
def test_an_engine_that_runs_out_of_memory_is_given_less_at_a_time(tmp_path: Path, ray_address: str) -> None:
    config = cluster_config(tmp_path, ray_address, rows=4, rows_per_unit=4)
    outcome = run(config, faults(tmp_path, most_rows=2))
    assert outcome.failed == []
    assert [report.rows for _, report in sorted(outcome.reports.items())] == [4, 0]
    assert read_commit(Store(config.output), 0).environment["parts"] == 2
    deaths = [trial.died_of for trial in AttemptStore(Store(config.output)).read(0).trials if trial.died_of]
    assert all(death.out_of_memory and "CUDA out of memory" in death.reason for death in deaths)
    assert contents(config.output) == unbroken(tmp_path, rows=4, rows_per_unit=4)


@pytest.mark.slow
def test_a_row_that_makes_the_engine_raise_any_exception_is_a_reject(tmp_path: Path, ray_address: str) -> None:
    config = cluster_config(tmp_path, ray_address, rows=8, rows_per_unit=4, max_attempts=1)
    assert run(config, faults(tmp_path, raises=("chat-5",))).failed == []
    (found,) = (reject for reject in rejects(config) if reject["reason"] == "kills_the_engine")
    assert (found["sample_id"], found["detail"]) == ("chat-5", "the engine raised KeyError")


@pytest.mark.slow
def test_first_units_that_all_fail_and_a_start_that_fails_end_the_run_by_name(tmp_path: Path, ray_address: str) -> None:
    config = cluster_config(tmp_path, ray_address)
    with pytest.raises(TeacherOutputInvalid, match="NaN"):
        run(config, faults(tmp_path, invalid=tuple(f"chat-{i}" for i in range(40))))
    assert committed_units(Store(config.output)) <= {4}
    with pytest.raises(TeacherUnusable, match="the faulty teacher"):
        run(config, faults(tmp_path, start_fails=True))


@pytest.mark.slow
def test_units_wait_for_min_workers_and_idle_workers_are_released(tmp_path: Path, ray_address: str) -> None:
    config = cluster_config(tmp_path, ray_address, rows=29, cluster={"min_workers": 2, "max_workers": 2})
    units = [unit.index for unit in prepare(config).units]
    with WorkerPool(config, load=faults(tmp_path, seconds=0.5)) as pool:
        seen = [(pool.workers, dict(pool.running)) for _ in pool.run_units(units)]
        assert len(seen) == 3
        assert seen[0][0] == 2, "both were ready when the first unit ended"
        assert {name for _, running in seen for name in running.values()} <= {"worker-0", "worker-1"}
        assert pool.workers <= 1, "the last unit needed one worker"
        assert pool.running == {}


@pytest.mark.slow
def test_a_full_disk_ends_the_run_by_name_and_committed_units_stay(
    tmp_path: Path, small_disk: SmallDisk, ray_address: str
) -> None:
    small_disk.resize("160k")
    config = cluster_config(tmp_path, ray_address, rows=199, output="small disk/dataset")
    with pytest.raises(StorageFull, match="No space left"):
        run(config, faults(tmp_path))
    done = committed_units(Store(config.output))
    assert 0 < len(done) < 20
    assert set(contents(config.output).values()) >= {read_commit(Store(config.output), u).shard.sha256 for u in done}
