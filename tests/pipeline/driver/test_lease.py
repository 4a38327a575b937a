"""Laws of the lease: real processes, real signals, on a local disk and on an object store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coldstill.pipeline.driver.lease import LEASE_NAME, Lease, LeaseRecord, read_lease
from coldstill.pipeline.errors import LeaseHeld, LeaseLost
from coldstill.storage_schema.errors import CommitDamaged
from coldstill.storage_schema.store import Store
from tests.pipeline.buckets import s3_bucket

HOLDER = """
import sys, time
from coldstill.pipeline.driver.lease import Lease
from coldstill.storage_schema.store import Store
with Lease(Store(sys.argv[1]), dead_after_s=float(sys.argv[2])):
    print("held", flush=True)
    while True:
        time.sleep(60)
"""


@pytest.fixture(params=["disk", "S3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    if request.param == "disk":
        yield Store(tmp_path / "dataset")
        return
    with s3_bucket(monkeypatch) as (url, _):
        yield Store(f"{url}/dataset")


def hold(store: Store, *, dead_after_s: float = 60) -> subprocess.Popen[str]:
    """Start another process that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.url, str(dead_after_s)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def rewrite(store: Store, **changes: object) -> LeaseRecord:
    """Change values of the lease, as if another driver had written it."""
    found = read_lease(store)
    assert found is not None
    changed = found.model_copy(update=changes)
    store.put(LEASE_NAME, changed.model_dump_json().encode())
    return changed


def test_a_second_driver_is_refused_and_the_error_names_the_first_and_its_age(store: Store) -> None:
    process = hold(store)
    try:
        with pytest.raises(LeaseHeld) as refused, Lease(store, dead_after_s=60):
            pass
    finally:
        process.kill()
        process.wait()
    assert f"pid {process.pid} on {socket.gethostname()}, started 20" in str(refused.value)
    assert "s ago" in str(refused.value)


def test_a_killed_driver_of_this_machine_is_replaced_at_once(store: Store) -> None:
    process = hold(store, dead_after_s=3600)
    process.kill()
    process.wait()
    with Lease(store, dead_after_s=60) as lease:
        held = read_lease(store)
        assert held is not None
        assert (held.pid, held.token) == (os.getpid(), lease.token)
    assert read_lease(store) is None


def test_a_driver_that_was_not_waited_for_by_its_parent_is_dead_too(tmp_path: Path) -> None:
    store = Store(tmp_path)
    process = hold(store, dead_after_s=3600)
    process.kill()
    while (found := read_lease(store)) is not None and not found.is_dead:
        time.sleep(0.01)
    process.wait()


def test_a_recycled_pid_is_not_the_driver(tmp_path: Path) -> None:
    """A process with this pid runs, but it started at another time than the one in the lease."""
    store = Store(tmp_path)
    process = hold(store, dead_after_s=3600)
    process.kill()
    process.wait()
    found = rewrite(store, pid=os.getpid())
    assert found.is_dead
    with Lease(store, dead_after_s=60):
        pass


def test_a_driver_of_another_machine_is_replaced_once_its_heartbeat_is_too_old(store: Store) -> None:
    process = hold(store, dead_after_s=3600)
    process.kill()
    process.wait()
    rewrite(store, machine="another", heartbeat=time.time() - 3500)
    with pytest.raises(LeaseHeld, match=r"35\d\d s ago"), Lease(store, dead_after_s=60):
        pass
    rewrite(store, heartbeat=time.time() - 3700)
    with Lease(store, dead_after_s=60):
        pass


def test_a_running_driver_never_counts_as_dead(tmp_path: Path) -> None:
    store = Store(tmp_path)
    process = hold(store, dead_after_s=3.0)
    try:
        over = time.monotonic() + 4
        while time.monotonic() < over:
            found = read_lease(store)
            assert found is not None
            assert not found.is_dead
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


def test_a_suspended_driver_that_was_replaced_stops_with_lease_lost(store: Store) -> None:
    """The first driver is suspended too long, the second takes over, and the first wakes up and finds its lease."""
    process = hold(store, dead_after_s=4.0)
    first = read_lease(store)
    while read_lease(store) == first:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # between two heartbeats
    rewrite(store, heartbeat=time.time() - 5)
    with Lease(store, dead_after_s=60) as second:
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 1
        found = read_lease(store)
        assert found is not None
        assert found.token == second.token


def test_losing_the_lease_interrupts_a_wait_in_the_main_thread(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def drive() -> None:
        with Lease(store, dead_after_s=0.4):
            while True:
                rewrite(store, token="another", pid=99)  # again, where it met a heartbeat
                time.sleep(0.5)

    with pytest.raises(LeaseLost, match="pid 99"):
        drive()


def test_a_driver_in_another_thread_raises_at_its_next_check(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def drive() -> None:
        with Lease(store, dead_after_s=0.4) as lease:
            while True:
                rewrite(store, token="another")
                lease.check()
                time.sleep(0.5)

    with ThreadPoolExecutor(1) as threads, pytest.raises(LeaseLost):
        threads.submit(drive).result(timeout=60)
    found = read_lease(store)
    assert found is not None
    assert found.token == "another", "the loser must not delete the winner's lease"


def test_of_many_drivers_that_take_over_from_a_dead_one_one_remains(tmp_path: Path) -> None:
    store = Store(tmp_path)
    process = hold(store, dead_after_s=3600)
    process.kill()
    process.wait()

    def drive() -> str:
        try:
            with Lease(store, dead_after_s=4.0) as lease:
                over = time.monotonic() + 5
                while time.monotonic() < over:
                    lease.check()
                    time.sleep(0.01)
                found = read_lease(store)
                return "holds" if found is not None and found.token == lease.token else "lost it unnoticed"
        except (LeaseHeld, LeaseLost) as error:
            return type(error).__name__

    with ThreadPoolExecutor(8) as threads:
        ends = list(threads.map(lambda _: drive(), range(8)))
    assert ends.count("holds") == 1
    assert "lost it unnoticed" not in ends


def test_an_error_of_the_driver_is_raised_and_the_lease_is_released(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="mine"), Lease(store, dead_after_s=60):
        raise ValueError("mine")
    assert read_lease(store) is None


def test_a_store_that_fails_for_a_while_does_not_end_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldstill.storage_schema.errors import StorageFailed

    store = Store(tmp_path)

    def refuse(name: str, data: bytes) -> None:
        raise StorageFailed(name)

    with Lease(store, dead_after_s=0.4):
        with monkeypatch.context() as patch:
            patch.setattr(store, "put", refuse)
            time.sleep(0.6)
            silent = read_lease(store)
        while (found := read_lease(store)) == silent:
            time.sleep(0.01)
        assert found is not None
        assert not found.is_dead


def test_a_lease_from_the_future_is_replaced_once_its_driver_has_been_silent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    process = hold(store, dead_after_s=3600)
    process.kill()
    process.wait()
    rewrite(store, machine="another", heartbeat=time.time() + 86_400, dead_after_s=1.0)
    with Lease(store, dead_after_s=60):
        found = read_lease(store)
        assert found is not None
        assert found.pid == os.getpid()


def test_a_damaged_lease_names_the_file_to_delete(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(LEASE_NAME, b"{")
    with pytest.raises(CommitDamaged, match="lease") as refused, Lease(store, dead_after_s=60):
        pass
    assert f"delete {store.url}/{LEASE_NAME}" in refused.value.fix
