"""Laws of resuming an old capture: the files of its run, written out here as releases before this one wrote them."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from coldstill.pipeline.cluster.attempts import AttemptStore, CrashReport, Trial, read_crash_report, write_crash_report
from coldstill.pipeline.cluster.poison_search import next_task
from coldstill.pipeline.driver.lease import Lease, read_lease
from coldstill.pipeline.driver.progress import Progress
from coldstill.pipeline.driver.status import read_progress, read_status
from coldstill.pipeline.errors import LeaseHeld
from coldstill.storage_schema.store import Store
from tests import making
from tests.pipeline.driver.test_status import Workers

ATTEMPTS = """{
  "unit": 3,
  "trials": [
    {"kind": "whole", "start": 24, "stop": 32, "worker": "worker-0", "alone": false,
     "died_of": {"cause": "its worker died", "reason": "the process exits", "out_of_memory": false}},
    {"kind": "whole", "start": 24, "stop": 32, "worker": "worker-1", "alone": true,
     "died_of": {"cause": "the engine hung", "reason": "hung: no progress for 600 s", "out_of_memory": false}},
    {"kind": "probe", "start": 24, "stop": 28, "worker": "worker-2", "alone": true, "died_of": null},
    {"kind": "probe", "start": 28, "stop": 32, "worker": "worker-2", "alone": true,
     "died_of": {"cause": "the engine hung", "reason": "hung: no progress for 600 s", "out_of_memory": false}},
    {"kind": "probe", "start": 28, "stop": 30, "worker": "worker-3", "alone": true, "died_of": null}
  ],
  "excluded": [{"source_row": 27, "detail": "the engine hung"}]
}
"""
CRASH_REPORT = """{
  "cause": "out of memory",
  "reason": "OutOfMemoryError: CUDA out of memory",
  "out_of_memory": true
}
"""
PROGRESS = """{
  "token": "0123456789abcdef",
  "state": "interrupted",
  "error": null,
  "started": 1764000000.5,
  "written": 1764000100.25,
  "own": {"starts": 1, "units": 2, "rows": 10, "tokens": 400, "targets": 200, "bytes": 9000,
          "worker_seconds": 100.0, "gpu_seconds": 200.0, "cost": 0.5},
  "earlier": {"starts": 1, "units": 1, "rows": 5, "tokens": 200, "targets": 100, "bytes": 4500,
              "worker_seconds": 50.0, "gpu_seconds": 100.0, "cost": null},
  "folded": ["fedcba9876543210"],
  "workers": 0,
  "running": {},
  "failed": [{"unit": 3, "reason": "why"}],
  "failed_units": 1,
  "tokens_per_s": 12.5,
  "rows_per_s": null,
  "score_seconds": null
}
"""
LEASE = """{
  "token": "0123456789abcdef",
  "host": "node-7",
  "machine": "0b56b1a5-95c7-4b1b-a3c8-5d7a8f1c2d3e/4026531836",
  "pid": 4711,
  "process_start": 123456,
  "started": %(started)r,
  "heartbeat": %(heartbeat)r,
  "dead_after_s": 120.0
}
"""


def test_a_search_for_poison_rows_continues_from_old_attempts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("attempts/000003.json", ATTEMPTS.encode())
    all_attempts = AttemptStore(store)
    assert all_attempts.units() == {3}
    attempts = all_attempts.read(3)
    assert [trial.isolated for trial in attempts.trials] == [False, True, True, True, True]
    task = next_task(attempts, first_row=24, rows=8, max_attempts=1)
    assert task is not None
    assert (task.kind, task.start, task.stop) == ("probe", 30, 32)


def test_attempts_keep_their_keys_on_disk(tmp_path: Path) -> None:
    """A driver of an earlier release reads them too."""
    store = Store(tmp_path)
    store.put("attempts/000003.json", ATTEMPTS.encode())
    AttemptStore(store).write(AttemptStore(store).read(3))
    assert json.loads(store.read("attempts/000003.json")) == json.loads(ATTEMPTS)


def test_attempts_are_read_by_either_name_of_a_field() -> None:
    trial = {"kind": "whole", "start": 0, "stop": 1, "worker": "w"}
    assert Trial.model_validate({**trial, "alone": True}) == Trial.model_validate({**trial, "isolated": True})


def test_an_old_crash_report_is_read_and_new_ones_have_its_keys_and_its_place(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("_run/last_words/abc-worker-0.json", CRASH_REPORT.encode())
    report = read_crash_report(store, "abc-worker-0")
    assert report == CrashReport(
        cause="out of memory", reason="OutOfMemoryError: CUDA out of memory", out_of_memory=True
    )
    write_crash_report(store, "abc-worker-1", report)
    assert store.read("_run/last_words/abc-worker-1.json") == CRASH_REPORT.encode()


def test_old_progress_is_shown_and_added_to_a_new_start(tmp_path: Path, tokenizer_folder: Path) -> None:
    store = making.begin_dataset(tmp_path, making.tiny_header(tokenizer_folder), tokenizer_folder, [5] * 4)
    store.put("progress/0123456789abcdef.json", PROGRESS.encode())
    status = read_status(str(tmp_path))
    assert (status.state, status.totals.starts, status.totals.tokens, status.totals.cost) == (
        "interrupted",
        2,
        600,
        0.5,
    )
    new = Progress(store, token="new", work=Workers())
    new.begin()
    record = read_progress(store)
    assert record is not None
    assert (record.token, record.totals.starts, record.totals.units) == ("new", 3, 3)
    assert store.names("progress") == ["new.json"]
    assert set(json.loads(store.read("progress/new.json"))) == set(json.loads(PROGRESS))
    # `rejected`, the rejects by reason, came later: it is written only when there are some.
    new.sealed(score_seconds=1.0, rejected={"too long": 2})
    new.write()
    assert set(json.loads(store.read("progress/new.json"))) == set(json.loads(PROGRESS)) | {"rejected"}


def test_an_old_lease_is_respected_while_its_driver_lives_and_replaced_afterwards(tmp_path: Path) -> None:
    store, now = Store(tmp_path), time.time()
    store.put("lease.json", (LEASE % {"started": now - 3600, "heartbeat": now - 10}).encode())
    with pytest.raises(LeaseHeld, match="pid 4711 on node-7"), Lease(store, dead_after_s=60):
        pass
    store.put("lease.json", (LEASE % {"started": now - 3600, "heartbeat": now - 300}).encode())
    with Lease(store, dead_after_s=60):
        found = read_lease(store)
        assert found is not None
        assert (found.pid, found.host) == (os.getpid(), socket.gethostname())
        assert set(json.loads(store.read("lease.json"))) == set(json.loads(LEASE % {"started": 0, "heartbeat": 0}))
