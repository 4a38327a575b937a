"""Laws of a store that fails for a while: a real S3 server whose responses fail, a real folder that is missing, and a
store in memory whose every request fails once."""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from coldstill.common import retry
from coldstill.common.interrupts import Interrupted, raising_interrupts
from coldstill.pipeline.capture import capture
from coldstill.pipeline.cluster import pool
from coldstill.pipeline.config import ClusterConfig
from coldstill.pipeline.driver.status import read_progress
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.worker import CaptureWorker
from coldstill.storage_schema.commits import committed_units, read_commit
from coldstill.storage_schema.errors import AccessDenied, StorageFailed, StorageFull, StoreUnreachable
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.plan import PLAN_NAME
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.store.retrying import RetryingStore
from tests.conftest import SmallDisk
from tests.pipeline.capturing import OneWorkerPool, capture_config
from tests.storage_schema.store.s3_server import S3Server, serve


@pytest.fixture
def broken_folder(tmp_path: Path) -> Path:
    """The root of a dataset whose `shards` is not a folder at the moment, like a mount that is gone."""
    root = tmp_path / "dataset"
    root.mkdir()
    (root / "shards").write_text("")
    return root


def test_a_write_waits_until_the_store_is_back(broken_folder: Path) -> None:
    def repair() -> None:
        time.sleep(0.7)
        (broken_folder / "shards").unlink()

    repairer = threading.Thread(target=repair)
    repairer.start()
    RetryingStore(broken_folder, retry_for_s=30).put("shards/a", b"whole")
    repairer.join()
    assert (broken_folder / "shards" / "a").read_bytes() == b"whole"
    assert RetryingStore(broken_folder, retry_for_s=0).create("shards/a", b"other") is False


def test_when_the_time_is_over_the_error_of_the_store_is_raised(broken_folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(StorageFailed, match="writing shards/a"):
        RetryingStore(broken_folder, retry_for_s=1.2).put("shards/a", b"")
    assert time.monotonic() - started > 0.2, "it was tried again"


def test_a_full_disk_and_a_missing_file_are_not_retried(tmp_path: Path, small_disk: SmallDisk) -> None:
    small_disk.resize("64k")
    started = time.monotonic()
    with pytest.raises(StorageFull):
        RetryingStore(small_disk.path, retry_for_s=600).put("large", b"x" * (1 << 20))
    with pytest.raises(FileNotFoundError):
        RetryingStore(tmp_path, retry_for_s=600).read("absent")
    assert time.monotonic() - started < 300


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server with one bucket, `captures`."""
    for server in serve():
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir("captures")
        yield server
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_worker_outlasts_an_object_store_that_fails_for_a_while(tmp_path: Path, s3_server: S3Server) -> None:
    config = capture_config(tmp_path, cluster={"store_retry_s": 60}).model_copy(
        update={"output": "s3://captures/dataset"}
    )
    store = prepare(config).store
    worker = CaptureWorker(config)
    for method, ending in (("PUT", ".parquet"), ("PUT", ".json"), ("GET", "")):
        s3_server.fail(method, ending, "409 Conflict", "OperationAborted", times=2)
    assert worker.run(0).rows == 10
    assert committed_units(store) == {0}
    assert store.names("shards") == [Path(read_commit(store, 0).shard.name).name]
    s3_server.fail("PUT", ".parquet", "409 Conflict", "OperationAborted", times=1000)
    short = CaptureWorker(config.model_copy(update={"cluster": ClusterConfig(store_retry_s=1)}))
    with pytest.raises(StorageFailed, match="writing shards/000001"):
        short.run(1)
    assert committed_units(store) == {0}


class Busy(OSError):
    """What a client raises for a response with status 503."""

    code = 503


@pytest.fixture
def outages(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """The requests of a store in memory so far, each of which fails the first time. A write then has its effect, and
    only its response is lost. Retries do not wait."""
    seen: set[tuple[str, str]] = set()

    def failing_once(request: str) -> Callable[..., Any]:
        plain = getattr(MemoryFileSystem, request)

        def call(self: MemoryFileSystem, path: str, *values: Any, **options: Any) -> Any:
            key = request, re.sub(r"-[0-9a-f]{12,}|/[0-9a-f]{16}", "", path.partition("/outages/")[2])
            if key in seen or not key[1]:
                return plain(self, path, *values, **options)
            seen.add(key)
            if request in ("pipe_file", "rm_file"):
                plain(self, path, *values, **options)
            raise Busy("try again")

        return call

    for request in ("exists", "cat_file", "info", "ls", "rm_file", "rm", "pipe_file"):
        monkeypatch.setattr(MemoryFileSystem, request, failing_once(request))
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.0)
    yield seen
    monkeypatch.undo()
    fsspec.filesystem("memory").rm("/outages", recursive=True)


def test_a_capture_outlasts_a_failure_of_each_of_its_requests(
    tmp_path: Path, outages: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "WorkerPool", OneWorkerPool)
    config = capture_config(tmp_path, rows=20, calibration_targets=0)
    unbroken = capture(config)
    found = capture(config.model_copy(update={"output": "memory://outages/dataset"}))
    assert (found.dataset_id, found.units, found.rejected) == (unbroken.dataset_id, unbroken.units, unbroken.rejected)
    record = read_progress(Store("memory://outages/dataset"))
    assert record is not None
    assert (record.state, record.own.units) == ("sealed", unbroken.units)
    writes = ("lease.json", HEADER_NAME, PLAN_NAME, "progress.json", MANIFEST_NAME)
    assert {f"dataset/{name}" for name in writes} <= {path for request, path in outages if request == "pipe_file"}
    assert {
        ("ls", "dataset/progress"),
        ("cat_file", "dataset/commits/000000.json"),
        ("rm", "dataset/staging"),
    } <= outages


def test_an_address_that_never_responded_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*values: object, **options: object) -> None:
        raise ConnectionError("no such host")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", unreachable)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 60.0)
    started = time.monotonic()
    with pytest.raises(StoreUnreachable):
        prepare(capture_config(tmp_path).model_copy(update={"output": "memory://outages/dataset"}))
    store = RetryingStore("memory://outages/dataset", retry_for_s=600, is_first=True)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda *values, **options: None)
    store.put("a", b"1")

    def denied(*values: object, **options: object) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", denied)
    with pytest.raises(AccessDenied):
        store.put("a", b"1")
    assert time.monotonic() - started < 30


def test_a_read_in_the_middle_of_a_remote_file_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(io.BytesIO):
        failures = 1

        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() and self.failures:
                self.failures -= 1
                raise Busy("try again")
            return super().read(size)

    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.0)
    store = RetryingStore("memory://outages/dataset", retry_for_s=60)
    store._in_memory = False
    monkeypatch.setattr(MemoryFileSystem, "open", lambda *values, **options: Cut(b"0123456789"))
    with store.open("shards/a") as file:
        assert [file.read(4), file.read(4), file.read()] == [b"0123", b"4567", b"89"]


def test_ctrl_c_ends_the_waits_of_other_threads(broken_folder: Path) -> None:
    store = RetryingStore(broken_folder, retry_for_s=600)

    def interrupt() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    def write_in_a_thread() -> None:
        with raising_interrupts(), ThreadPoolExecutor(2) as threads:
            threads.submit(interrupt)
            threads.submit(store.put, "shards/a", b"1").result()

    started = time.monotonic()
    with pytest.raises(Interrupted):
        write_in_a_thread()
    assert time.monotonic() - started < 20
