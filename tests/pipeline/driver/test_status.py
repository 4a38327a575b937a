"""Laws of `coldstill status`: read from the directory alone, during a run, after a kill, and after the end."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from coldstill.cli.status_table import show_status
from coldstill.common.clock import duration
from coldstill.pipeline.capture import capture
from coldstill.pipeline.cluster import pool
from coldstill.pipeline.cluster.dispatcher import FailedUnit
from coldstill.pipeline.driver.lease import Lease
from coldstill.pipeline.driver.progress import Progress, ProgressBar, Rates
from coldstill.pipeline.driver.status import MAX_LISTED, PROGRESS_FOLDER, Status, Totals, read_progress, read_status
from coldstill.pipeline.errors import CaptureIncomplete
from coldstill.pipeline.worker import UnitReport
from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.errors import DatasetNotFound
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.store import Store
from tests import making
from tests.pipeline.buckets import s3_bucket
from tests.pipeline.capturing import OneWorkerPool, capture_config

UNITS = 4
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


@dataclass
class Workers:
    """Two workers with a GPU each, in place of a `WorkerPool`."""

    workers: int = 2
    gpus_per_worker: float = 1.0
    running: dict[int, str] = field(default_factory=dict)
    failed: list[FailedUnit] = field(default_factory=list)


def begin(root: Path | str, tokenizer: Path) -> Store:
    """A dataset directory with four units of five rows."""
    return making.begin_dataset(root, making.tiny_header(tokenizer), tokenizer, [5] * UNITS)


def commit(store: Store, tokenizer: Path, unit: int) -> UnitReport:
    """Four rows of a unit, and a reject."""
    from coldstill.storage_schema.commits import Reject

    rng = np.random.default_rng(unit)
    rows = [making.random_row(rng, f"row-{unit}-{i}") for i in range(4)]
    record = commit_unit(
        store,
        unit,
        rows=rows,
        rejects=[Reject(5 * unit + 4, "last", "no_targets", "")],
        header=making.tiny_header(tokenizer),
        environment={},
    )
    return UnitReport(unit, record.rows, record.rejected, record.tokens, record.targets, record.shard.bytes)


def shown(status: Status) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    show_status(status, console=console)
    return console.export_text()


def test_a_running_capture_shows_its_done_running_and_failed_units(tmp_path: Path, tokenizer_folder: Path) -> None:
    store = begin(tmp_path, tokenizer_folder)
    work = Workers(running={1: "worker-0", 2: "worker-1"})
    with Lease(store, dead_after_s=60) as lease, Progress(store, token=lease.token, work=work) as progress:
        assert read_status(str(tmp_path)).state == "starting"
        progress.begin()
        report = commit(store, tokenizer_folder, 0)
        progress.add(report, source_rows=5)
        work.failed.append(FailedUnit(3, "it kills every worker"))
        while (status := read_status(str(tmp_path))).totals.units < 1:
            progress.write()
        assert (status.state, status.units_planned, status.units_done) == ("running", UNITS, 1)
        assert (status.units_running, status.units_failed, status.workers) == (2, 1, 2)
        assert (status.rows_planned, status.rows_done) == (20, 5)
        assert (status.totals.rows, status.totals.tokens) == (5, report.tokens)
        assert not status.is_over
        text = shown(status)
    assert "it kills every worker" in text
    assert "1 of 4 done" in text
    assert "worker-1" in text


def test_rates_give_the_remaining_time(tmp_path: Path, tokenizer_folder: Path) -> None:
    store = begin(tmp_path, tokenizer_folder)
    with Lease(store, dead_after_s=60) as lease, Progress(store, token=lease.token, work=Workers()) as progress:
        progress.begin()
        started = time.monotonic()
        while progress.rates is None:
            if time.monotonic() - started > 1.5 and not progress.totals.units:
                progress.add(commit(store, tokenizer_folder, 0), source_rows=5)
            time.sleep(0.05)
        progress.write()
        status, record = read_status(str(tmp_path)), read_progress(store)
        assert record is not None
        assert record.rows_per_s
        assert status.time_left_s == pytest.approx(15 / record.rows_per_s)


def test_the_driver_writes_by_itself_and_a_killed_one_is_shown_dead(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A real process and SIGKILL; the status is read from the directory alone."""
    begin(tmp_path, tokenizer_folder)
    script = (
        "import sys, time\n"
        "import coldstill.pipeline.driver.progress as module\n"
        "module._WRITE_EVERY_S = 1\n"
        "from coldstill.pipeline.driver.lease import Lease\n"
        "from coldstill.storage_schema.store import Store\n"
        "from tests.pipeline.driver.test_status import Workers\n"
        "store, work = Store(sys.argv[1]), Workers(workers=3, running={0: 'worker-0'})\n"
        "with Lease(store, dead_after_s=60) as lease:\n"
        "    with module.Progress(store, token=lease.token, work=work, price_per_gpu_hour=3600.0) as progress:\n"
        "        progress.begin()\n"
        "        time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[3])
    try:
        while True:
            status = read_status(str(tmp_path))
            if status.state == "running" and status.totals.worker_seconds > 3:
                break
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert status.driver is not None
    assert f"pid {process.pid}" in status.driver
    dead = read_status(str(tmp_path))
    assert (dead.state, dead.workers, dead.units_running, dead.time_left_s) == ("dead", 0, 0, None)
    assert dead.totals.cost == pytest.approx(dead.totals.gpu_seconds)
    assert dead.totals.gpu_seconds == dead.totals.worker_seconds >= status.totals.worker_seconds
    assert "re-run the same command to resume" in shown(dead)


def test_costs_of_all_starts_add_up_in_one_record_after_any_kills(tmp_path: Path, tokenizer_folder: Path) -> None:
    store = begin(tmp_path, tokenizer_folder)
    expected = Totals()
    for start in range(5):
        progress = Progress(store, token=f"start-{start}", work=Workers(), price_per_gpu_hour=2.0)
        progress.begin()
        progress.add(UnitReport(start, 4, 1, 100, 50, 1000), source_rows=5)
        time.sleep(0.01)
        progress.write()  # and then it is killed
        record = read_progress(store)
        assert record is not None
        expected += record.own
        assert record.totals.model_dump() == pytest.approx(expected.model_dump())
    assert store.names(PROGRESS_FOLDER) == ["start-4.json"]
    assert (expected.starts, expected.units, expected.rows, expected.tokens) == (5, 5, 25, 500)
    assert expected.cost


def test_a_kill_between_adding_up_and_removing_counts_nothing_twice(tmp_path: Path, tokenizer_folder: Path) -> None:
    store = begin(tmp_path, tokenizer_folder)
    first = Progress(store, token="first", work=Workers())
    first.begin()
    first.add(UnitReport(0, 5, 0, 100, 50, 1000), source_rows=5)
    first.write()
    left = store.read("progress/first.json")
    second = Progress(store, token="second", work=Workers())
    second.begin()
    store.put("progress/first.json", left)  # as if it was not deleted yet, or written again by the first
    found = read_progress(store)
    assert found is not None
    assert (found.token, found.totals.tokens) == ("second", 100)
    third = Progress(store, token="third", work=Workers())
    third.begin()
    assert store.names(PROGRESS_FOLDER) == ["third.json"]
    assert third.totals.tokens == 100
    assert third.totals.starts == 3


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(15), "interrupted"),
        (CaptureIncomplete("units"), "incomplete"),
        (ValueError("no room"), "stopped"),
    ],
)
def test_the_status_shows_how_a_run_ended(
    tmp_path: Path, tokenizer_folder: Path, error: BaseException, state: str
) -> None:
    store = begin(tmp_path, tokenizer_folder)

    def run() -> None:
        work = Workers(running={0: "worker-0"})
        with Lease(store, dead_after_s=60) as lease, Progress(store, token=lease.token, work=work) as progress:
            progress.begin()
            raise error

    with pytest.raises(type(error)):
        run()
    status = read_status(str(tmp_path))
    assert (status.state, status.driver, status.running) == (state, None, {})
    assert status.error == ("ValueError: no room" if state == "stopped" else None)
    shown(status)


def test_after_sealing_counts_come_from_the_manifest_and_costs_stay(tmp_path: Path, tokenizer_folder: Path) -> None:
    store = begin(tmp_path, tokenizer_folder)
    with Progress(store, token="one", work=Workers(), price_per_gpu_hour=1.0) as progress:
        progress.begin()
        for unit in range(UNITS):
            commit(store, tokenizer_folder, unit)  # and no report reached the record
        manifest = seal(store)
    status = read_status(str(tmp_path))
    assert (status.state, status.units_done, status.rows_done) == ("sealed", UNITS, 20)
    assert (status.totals.tokens, status.totals.targets) == (manifest.tokens, manifest.targets)
    assert status.totals.cost
    assert status.dataset_id
    assert status.is_over
    assert "cost" in shown(status)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "generate", "sampling": {"n": 3, "max_tokens": 4}},
        {"mode": "pretrain", "documents": "concat"},
    ],
)
def test_progress_counts_rows_of_the_source_however_many_rows_a_shard_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The time that is left is that of the source's rows which are left."""
    shown_rows: list[int] = []
    monkeypatch.setattr(pool, "WorkerPool", OneWorkerPool)
    monkeypatch.setattr(ProgressBar, "add", lambda self, rows: shown_rows.append(rows))
    config = capture_config(tmp_path, rows=12, rows_per_unit=5, **changes)
    making.write_jsonl(Path(str(config.source.path)), [{"text": f"text number {n}", **CHAT} for n in range(12)])
    assert capture(config).rows != 12
    record, status = read_progress(Store(config.output)), read_status(config.output)
    assert record is not None
    assert (shown_rows, record.totals.rows) == ([5, 5, 2], 12)
    assert (status.rows_planned, status.rows_done, status.totals.rows) == (12, 12, 12)


def test_a_sealed_dataset_that_was_not_captured_here_has_a_status_too(tiny_dataset: Path) -> None:
    status = read_status(str(tiny_dataset))
    assert (status.state, status.totals.starts, status.totals.cost) == ("sealed", 0, None)
    shown(status)


def test_an_empty_directory_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound, match="neither a dataset"):
        read_status(str(tmp_path / "absent"))


def test_a_directory_without_a_driver_is_idle(tmp_path: Path, tokenizer_folder: Path) -> None:
    begin(tmp_path, tokenizer_folder)
    assert read_status(str(tmp_path)).state == "idle"


def test_the_record_stays_small_with_many_failures(tmp_path: Path, tokenizer_folder: Path) -> None:
    store = begin(tmp_path, tokenizer_folder)
    work = Workers(failed=[FailedUnit(unit, "why") for unit in range(5 * MAX_LISTED)])
    progress = Progress(store, token="one", work=work)
    progress.begin()
    record = read_progress(store)
    assert record is not None
    assert (len(record.failed), record.failed_units) == (MAX_LISTED, 5 * MAX_LISTED)


def test_text_of_a_record_cannot_control_the_terminal(tmp_path: Path, tokenizer_folder: Path) -> None:
    store = begin(tmp_path, tokenizer_folder)
    progress = Progress(store, token="one", work=Workers(failed=[FailedUnit(0, "\x1b[31m[bold]red")]))
    progress.begin()
    progress.write("stopped", error="\x1b[2J")
    text = shown(read_status(str(tmp_path)))
    assert "\x1b" not in text
    assert "[bold]red" in text


def test_the_status_of_an_object_store_reads_no_commit(monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Path) -> None:
    with s3_bucket(monkeypatch) as (url, server):
        store = begin(f"{url}/dataset", tokenizer_folder)
        with Lease(store, dead_after_s=60) as lease, Progress(store, token=lease.token, work=Workers()) as progress:
            progress.begin()
            commit(store, tokenizer_folder, 2)
            server.requests.clear()
            status = read_status(f"{url}/dataset")
            assert (status.state, status.units_done) == ("running", 1)
            assert [path for method, path in server.requests if method == "GET" and "/commits/" in path] == []


def run_cli(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "coldstill", "status", *words], capture_output=True, text=True)


def test_the_command_prints_a_table_or_json_and_watches_to_the_end(tiny_dataset: Path, tmp_path: Path) -> None:
    table = run_cli(str(tiny_dataset))
    assert table.returncode == 0, table.stderr
    assert "all units are done" in table.stdout
    document = json.loads(run_cli(str(tiny_dataset), "--json").stdout)
    assert (document["state"], document["units_done"]) == ("sealed", 3)
    watched = run_cli(str(tiny_dataset), "--watch", "--json")
    assert json.loads(watched.stdout) == document
    absent = run_cli(str(tmp_path / "absent"))
    assert absent.returncode == 1
    assert "DatasetNotFound" in absent.stderr


def test_a_status_needs_none_of_what_a_capture_needs(tiny_dataset: Path) -> None:
    """It runs on a laptop: torch, Ray, transformers and vLLM are not imported."""
    script = (
        "import sys\nfrom coldstill.pipeline.driver.status import read_status\n"
        "import coldstill.cli.status_table\n"
        "read_status(sys.argv[1])\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_dataset)], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "1 min 0 s"), (3_661, "1 h 1 min"), (90_000, "1 d 1 h"), (None, "not known yet")],
)
def test_durations_are_words(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words
    assert re.sub(r"[\d ]", "", words)


def test_a_running_capture_says_when_it_ends() -> None:
    status = Status(
        root="here",
        state="running",
        units_done=1,
        units_running=1,
        units_failed=0,
        totals=Totals(),
        workers=1,
        time_left_s=1_800.0,
    )
    console = Console(width=100, record=True, file=io.StringIO())
    show_status(status, console=console, now=datetime(2026, 11, 29, 14, 2))
    assert "about 14:32 today" in console.export_text()


def test_the_bar_of_a_capture_says_when_it_ends() -> None:
    progress: Any = SimpleNamespace(rates=Rates(rows=2.0, tokens=9.0, targets=8.0), totals=Totals(), on_second=None)
    with ProgressBar(
        progress, work=Workers(), rows=4_600, rows_done=1_000, now=lambda: datetime(2026, 11, 29, 14, 2)
    ) as bar:
        assert "ends about 14:32 today" in bar._text()
        rates, progress.rates = progress.rates, None
        assert "ends" not in bar._text()
        progress.rates = rates
    assert bar._bar.postfix == "8 targets/s, workers: 2"
