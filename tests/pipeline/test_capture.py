"""Laws of a whole capture: real Ray, processes and signals; real vLLM where the name says so."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from coldstill.cli.main import main
from coldstill.pipeline.capture import capture
from coldstill.pipeline.cluster import pool
from coldstill.pipeline.driver.status import read_status
from coldstill.pipeline.errors import (
    AllRowsRejected,
    CaptureIncomplete,
    ClusterTooSmall,
    LeaseHeld,
    TooManyUnits,
    UnitFailed,
)
from coldstill.pipeline.prepare import prepare
from coldstill.storage_schema.commits import commit_name, committed_units
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.store import Store
from coldstill.tools.verify import verify
from tests import making
from tests.pipeline.capturing import capture_config, contents, do_units, write_config
from tests.pipeline.cluster.faulty import Faults

VLLM = {"engine": "vllm", "draws": 8, "engine_args": making.SMALL_ENGINE}
PROGRAM = """
import ctypes
from coldstill.cli.main import run
c = ctypes.CDLL(None)
c.__cxa_atexit(ctypes.cast(c.abort, ctypes.c_void_p), None, None)
run()
"""
"""`coldstill` in a process that a destructor would abort. Threads of Ray may meet such a one: see `end_process`."""


def _start(config_path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, "capture", str(config_path), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the process ended too early: {process.communicate()}")
        time.sleep(0.02)


def _finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out


def _killed_half_way_equals_unbroken(folder: Path, **changes: object) -> None:
    unbroken = write_config(folder / "unbroken.yaml", capture_config(folder, rows=120, output="unbroken", **changes))
    _finish(_start(unbroken))
    config = capture_config(folder, rows=120, **changes)
    path = write_config(folder / "capture.yaml", config)
    process = _start(path)
    _wait_for(lambda: len(committed_units(Store(config.output))) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = committed_units(Store(config.output))
    assert len(done) < 13, "the kill came too late to prove anything"
    assert read_status(config.output).state == "dead"
    before = contents(config.output, "commits")
    out = _finish(_start(path))
    assert "dataset id" in out
    status = read_status(config.output)
    assert (status.state, status.totals.starts, status.units_done) == ("sealed", 2, 13)
    after = contents(config.output, "commits")
    assert {name: after[name] for name in before} == before, "a committed unit was written again"
    assert contents(config.output) == contents(folder / "unbroken")
    assert open_dataset(config.output).dataset_id == open_dataset(folder / "unbroken").dataset_id
    assert verify(config.output, deep=True, progress=False) == []


@pytest.mark.slow
def test_capture_killed_half_way_and_started_again_equals_an_unbroken_one(tmp_path: Path) -> None:
    _killed_half_way_equals_unbroken(tmp_path)


@pytest.mark.slow
def test_capture_by_vllm_killed_half_way_and_started_again_equals_an_unbroken_one(tmp_path: Path) -> None:
    _killed_half_way_equals_unbroken(tmp_path, teacher=VLLM)


def test_a_second_driver_is_refused_while_one_runs_and_ctrl_c_ends_that_one_cleanly(tmp_path: Path) -> None:
    config = capture_config(tmp_path, rows=1500)
    path = write_config(tmp_path / "capture.yaml", config)
    process = _start(path)
    _wait_for(lambda: len(committed_units(Store(config.output))) >= 3, process)
    with pytest.raises(LeaseHeld, match=f"pid {process.pid}"):
        capture(config)
    status = read_status(config.output)
    assert (status.state, status.units_planned) == ("running", 151)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Interrupted. Committed units are kept; re-run the same command to resume." in err
    assert "Traceback" not in err
    status = read_status(config.output)
    assert (status.state, status.driver, status.workers) == ("interrupted", None, 0)
    assert 3 <= status.units_done < 151


def test_sigterm_releases_the_lease_says_how_to_resume_and_exits_with_143(tmp_path: Path) -> None:
    config = capture_config(tmp_path, rows=1500)
    process = _start(write_config(tmp_path / "capture.yaml", config))
    _wait_for(lambda: len(committed_units(Store(config.output))) >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "Interrupted by SIGTERM. Committed units are kept; re-run the same command to resume." in err
    assert "Traceback" not in err
    assert "*** SIGTERM" not in err
    status = read_status(config.output)
    assert (status.state, status.driver, status.workers) == ("interrupted", None, 0)


@pytest.mark.slow
def test_units_that_fail_are_named_at_the_end_all_others_are_committed_and_a_later_start_seals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = capture_config(tmp_path, teacher={"draws": 0}, calibration_targets=0)
    faults = Faults(folder=str(tmp_path), invalid=("chat-13",))
    with monkeypatch.context() as patch:
        patch.setattr(pool, "WorkerPool", functools.partial(pool.WorkerPool, load=faults))
        with pytest.raises(CaptureIncomplete, match="unit 1: ") as failed:
            capture(config)
    assert "NaN" in str(failed.value)
    assert committed_units(Store(config.output)) == {0, 2, 3, 4}
    status = read_status(config.output)
    assert (status.state, status.units_failed, status.failed[0].unit) == ("incomplete", 1, 1)
    assert not Store(config.output).exists(MANIFEST_NAME)
    assert capture(config).rows == 40
    assert read_status(config.output).state == "sealed"


def test_a_finished_capture_reads_each_commit_once_to_seal_and_none_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = capture_config(tmp_path, calibration_targets=0)
    prepare(config)
    do_units(config)
    read: list[str] = []
    real = Store.read

    def watched(store: Store, name: str, **limits: int) -> bytes:
        read.append(name)
        return real(store, name, **limits)

    monkeypatch.setattr(Store, "read", watched)
    first = capture(config)
    assert sorted(name for name in read if name.startswith("commits/")) == [commit_name(unit) for unit in range(5)]
    read.clear()
    second = capture(config)
    assert not any(name.startswith("commits/") for name in read)
    assert second.model_copy(update={"wall_s": 0.0}) == first.model_copy(update={"wall_s": 0.0})
    assert first.tokens_per_s > 0


def test_a_plan_that_no_manifest_can_list_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldstill.pipeline.capture.MAX_SEALED_UNITS", 4)
    with pytest.raises(TooManyUnits, match="rows_per_unit"):
        capture(capture_config(tmp_path, calibration_targets=0))


def test_capture_by_vllm_through_ray_is_whole(tmp_path: Path) -> None:
    summary = capture(capture_config(tmp_path, teacher=VLLM))
    assert (summary.units, summary.rows, summary.rejected) == (5, 40, 1)
    assert open_dataset(tmp_path / "dataset").header.tail == "exact"
    assert verify(tmp_path / "dataset", deep=True, progress=False) == []
    again = capture(capture_config(tmp_path, teacher=VLLM))
    assert again.dataset_id == summary.dataset_id


def _workers(state: str = "") -> list[psutil.Process]:
    """The Ray actor processes below this one, by the process titles that Ray sets."""
    title = f"ray::_RayWorker{state}"
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.is_running() and title in " ".join(child.cmdline())]


@contextmanager
def _killing(state: str, *, at_most: int) -> Iterator[list[int]]:
    """Send SIGKILL to workers in this state as soon as they appear, until `at_most` are dead."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while len(killed) < at_most and not over.wait(0.01):
            with suppress(psutil.Error):
                for worker in _workers(state)[:1]:
                    worker.kill()
                    killed.append(worker.pid)
                    over.wait(1)  # a dead worker stays visible for a while

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        over.set()
        killer.join()


@pytest.mark.slow
def test_workers_that_are_killed_are_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    """Two kills, and another number of workers than in the unbroken run."""
    with _killing(".run", at_most=2) as killed:
        summary = capture(capture_config(tmp_path, rows=300, cluster={"max_workers": 2}))
    assert killed
    assert (summary.rows, summary.rejected) == (300, 1)
    unbroken = capture(capture_config(tmp_path, rows=300, output="unbroken"))
    assert unbroken.dataset_id == summary.dataset_id


@pytest.mark.slow
@pytest.mark.parametrize(("calibration_targets", "what"), [(8192, "the calibration pass"), (0, "a worker's start")])
def test_a_worker_that_dies_at_each_start_ends_the_capture_by_name(
    tmp_path: Path, calibration_targets: int, what: str
) -> None:
    with _killing("", at_most=100), pytest.raises(UnitFailed, match=what):
        capture(capture_config(tmp_path, calibration_targets=calibration_targets))


@pytest.mark.slow  # `test_nodes.py` holds the rule without a cluster
def test_a_worker_that_could_never_start_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ClusterTooSmall, match="gpus_per_worker"):
        capture(capture_config(tmp_path, cluster={"gpus_per_worker": 64}))


def test_a_workers_named_error_reaches_the_user_with_exit_code_1(tmp_path: Path) -> None:
    config = capture_config(tmp_path, teacher={"engine_args": {"attn_implementation": "no such thing"}})
    process = _start(write_config(tmp_path / "capture.yaml", config))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "TeacherUnusable" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.topk=4"], "did you mean teacher.top_k?"),
        (["source.path=absent.jsonl"], "SourceNotFound"),
        (["teacher.engine=vllm", "teacher.tap=public"], "tap worker and engine transformers can"),
        (["nonsense"], "key=value"),
    ],
)
def test_bad_settings_are_named_with_exit_code_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    path = write_config(tmp_path / "capture.yaml", capture_config(tmp_path))
    monkeypatch.setattr(sys, "argv", ["coldstill", "capture", str(path), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_capture_that_is_refused_leaves_no_folder_behind(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    making.write_jsonl(tmp_path / "rows.jsonl", [{"dialog": "x"}] * 3)
    with pytest.raises(AllRowsRejected, match="neither 'messages' nor 'prompt' nor 'text' holds text"):
        capture(config)
    assert not Path(config.output).exists()
    Path(config.output).mkdir()
    with pytest.raises(AllRowsRejected):
        capture(config)
    assert Path(config.output).exists(), "it was the user's"
