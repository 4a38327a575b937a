"""Laws of a store that fails for a while: a real S3 server whose responses fail, and a real folder that is missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from coldstill.pipeline.config import ClusterConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.worker import CaptureWorker
from coldstill.storage_schema.commits import committed_units, read_commit
from coldstill.storage_schema.errors import StorageFailed, StorageFull
from coldstill.storage_schema.store.retrying import RetryingStore
from tests.conftest import SmallDisk
from tests.pipeline.capturing import capture_config
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
