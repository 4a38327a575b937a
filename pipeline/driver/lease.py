"""The lease: at most one driver at a time works on a dataset directory.

The lease avoids duplicate work; correctness does not depend on it. Two drivers at once would process units twice, and
the commit protocol keeps the first result of each (`storage_schema/commits.py`). So one file that is created only if
absent is enough, also on stores without conditional replacement. If two drivers take over from the same dead one, or a
suspended driver resumes, the next heartbeat of one of them finds the other's token in the file, and that driver stops.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from coldstill.common.models import FrozenModel, parse_document
from coldstill.pipeline.errors import LeaseHeld, LeaseLost
from coldstill.storage_schema.errors import CommitDamaged, StorageFailed
from coldstill.storage_schema.store import Store

LEASE_NAME = "lease.json"
_BEATS = 8
"""Number of heartbeats within `dead_after_s`: a slow store may lose some of them."""


class LeaseRecord(FrozenModel):
    """A driver and its last heartbeat; times in seconds of the Unix clock."""

    token: str
    host: str
    machine: str
    """Boot and process namespace, within which `pid` is unique."""
    pid: int
    process_start: int | None
    """Clock ticks from boot to the process's start: differs for a later process with the same pid."""
    started: float
    heartbeat: float
    dead_after_s: float

    @property
    def age_s(self) -> float:
        """Seconds since the last heartbeat, by this machine's clock."""
        return max(0.0, time.time() - self.heartbeat)

    @property
    def seconds_ahead(self) -> float:
        """Seconds by which the last heartbeat is in this machine's future."""
        return max(0.0, self.heartbeat - time.time())

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended, or its last heartbeat is older than `dead_after_s`."""
        is_known = self.machine == _machine() and self.process_start is not None
        return self.age_s > self.dead_after_s or (is_known and _process_start(self.pid) != self.process_start)

    @property
    def name(self) -> str:
        """A description of the driver, for messages."""
        with suppress(OverflowError, ValueError, OSError):  # a number that no calendar has
            started = datetime.fromtimestamp(self.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            heartbeat = f"{self.age_s:.0f} s ago"
            if self.seconds_ahead >= 1:
                heartbeat = f"{self.seconds_ahead:.0f} s ahead of this machine's clock"
            return f"the driver with pid {self.pid} on {self.host}, started {started}, last heartbeat {heartbeat}"
        return f"the driver with pid {self.pid} on {self.host}"


def read_lease(store: Store) -> LeaseRecord | None:
    """The lease of a dataset directory; None if no driver holds it. Raises `CommitDamaged`, `StorageFailed`."""
    try:
        data = store.read(LEASE_NAME)
    except FileNotFoundError:
        return None
    try:
        return parse_document(data, model=LeaseRecord, where=f"{store.url}/{LEASE_NAME}", error=CommitDamaged)
    except CommitDamaged as error:
        raise CommitDamaged(
            error.what,
            found=error.found,
            wanted="a lease; a running driver replaces a damaged one at its next heartbeat",
            fix=f"if no driver is running, delete {store.url}/{LEASE_NAME} and re-run the same command",
        ) from None


class Lease:
    """The exclusive right of this process to capture into a dataset directory, while the `with` block lasts.

    A thread writes the heartbeats. When the store fails, the next heartbeat tries again, so a `RetryingStore` retries
    only the taking of the lease. A driver that lost its lease leaves the block with `LeaseLost`: at once if the block
    runs in the main thread, elsewhere at its next `check`.
    """

    def __init__(self, store: Store, *, dead_after_s: float):
        now = time.time()
        self._store, self._unretried = store, Store(store.url)
        self._mine = LeaseRecord(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
            started=now,
            heartbeat=now,
            dead_after_s=dead_after_s,
        )
        self._winner: LeaseRecord | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._owner = threading.current_thread()

    @property
    def token(self) -> str:
        """The unique token of this start."""
        return self._mine.token

    def __enter__(self) -> Lease:
        """Take the lease. Raises `LeaseHeld` if another driver is alive, `StorageFailed`."""
        while not self._store.create(LEASE_NAME, self._record()):
            found = read_lease(self._store)
            if found is not None and found.token == self.token:
                break  # our own creation succeeded, but its response was lost
            if found is not None and not found.is_dead and not self._is_silent(found):
                raise LeaseHeld(
                    f"{self._store.url}: {LEASE_NAME}",
                    found=found.name,
                    wanted="no other driver on this dataset directory",
                    fix=f"wait for it (`coldstill status {self._store.url}` shows its progress), or stop it first; "
                    f"a driver without a heartbeat for {found.dead_after_s:g} s counts as dead and is replaced",
                )
            if found is not None:
                self._store.delete(LEASE_NAME)
        self._owner = threading.current_thread()
        self._thread.start()
        return self

    def _is_silent(self, found: LeaseRecord) -> bool:
        """Whether a lease with a heartbeat in the future has no further one for as long as a driver may be silent.

        The clock of its machine is ahead of this one, so its age says nothing: this clock only measures the wait.
        """
        if found.seconds_ahead <= found.dead_after_s / _BEATS:
            return False
        until = time.monotonic() + found.dead_after_s
        while time.monotonic() < until:
            time.sleep(min(1.0, found.dead_after_s / _BEATS))
            if read_lease(self._store) != found:
                return False
        return True

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        self._over.set()
        self._thread.join()
        if self._winner is None:
            with suppress(StorageFailed, CommitDamaged):
                found = read_lease(self._unretried)
                if found is not None and found.token == self.token:
                    self._unretried.delete(LEASE_NAME)
        elif kind is None or issubclass(kind, KeyboardInterrupt):
            raise self._lost(self._winner) from None

    def check(self) -> None:
        """Raise `LeaseLost` if another driver took over."""
        if self._winner is not None:
            raise self._lost(self._winner)

    def _keep(self) -> None:
        while not self._over.wait(self._mine.dead_after_s / _BEATS):
            with suppress(StorageFailed, CommitDamaged):
                self._refresh()
            if self._winner is not None:
                if self._owner == threading.main_thread() and not self._over.is_set():
                    signal.pthread_kill(self._owner.ident or 0, signal.SIGINT)  # interrupts any wait
                return

    def _refresh(self) -> None:
        store = self._unretried
        try:
            found = read_lease(store)
        except CommitDamaged:  # this driver holds it: another one waits until it can be read
            store.put(LEASE_NAME, self._record())
            return
        if found is None:
            store.create(LEASE_NAME, self._record())  # another driver may take over now: the first one wins
        elif found.token == self.token:
            store.put(LEASE_NAME, self._record())
        else:
            self._winner = found

    def _record(self) -> bytes:
        return self._mine.model_copy(update={"heartbeat": time.time()}).model_dump_json(indent=2).encode()

    def _lost(self, winner: LeaseRecord) -> LeaseLost:
        return LeaseLost(
            f"{self._store.url}: {LEASE_NAME}",
            found=winner.name,
            wanted="this driver",
            fix="let the other driver finish; all units that this one committed are kept",
        )


def _machine() -> str:
    """Where process ids are unique: one boot of one kernel, one process namespace."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def _process_start(pid: int) -> int | None:
    """Clock ticks from boot to the start of a running process; None without such a process, or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie has ended
