"""The laws of the store and of the commit protocol on object stores: a real S3 protocol server, and memory.

`gs://` has no such server. One test connects the real gcsfs to an endpoint for uploads only: its
`pipe_file(mode="create")` asks for `ifGenerationMatch=0`, and 412 becomes a `create` that was not the one.
"""

from __future__ import annotations

import importlib.util
import io
import os
import secrets
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

if importlib.util.find_spec("moto") is None:
    pytest.skip("no moto: no S3 server", allow_module_level=True)
pytest.importorskip("s3fs")

from coldstill.storage_schema.commits import CommitRecord, commit_name, commit_unit, committed_units, read_commit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import (
    AccessDenied,
    DatasetNotSealed,
    FileMissing,
    UnsupportedStore,
)
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.tools.card_text import CARD_FILES
from coldstill.tools.pull import dataset_files, pull
from coldstill.tools.push import push
from coldstill.tools.verify import verify
from tests import making
from tests.storage_schema.store.s3_server import S3Server

REPOSITORY = Path(__file__).parents[3]
UNITS = 3
WORKER = """
import sys
from tests.storage_schema.store.test_object_store import DatasetHeader, Store, commit
store = Store(sys.argv[1])
commit(store, DatasetHeader.from_bytes(store.read("dataset.json"), where=""), 1, seed=int(sys.argv[2]))
"""


@pytest.fixture(params=["s3", "memory"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('bucket')}/some/dataset"
    return f"memory://{secrets.token_hex(4)}/dataset"


@pytest.fixture(scope="module")
def header(tokenizer_folder: Path) -> DatasetHeader:
    return making.tiny_header(tokenizer_folder)


class GoogleUploads(BaseHTTPRequestHandler):
    """Of Google's JSON API the upload of a small object, conditional or not."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        taken = len(self.server.asked) > 1 and "ifGenerationMatch=0" in self.path  # type: ignore[attr-defined]
        body = b'{"error": {"message": "conditionNotMet"}}' if taken else b'{"name": "a", "size": "1"}'
        self.send_response(412 if taken else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


def rows_of(seed: int) -> list[CachedRow]:
    rng = np.random.default_rng(seed)
    return [making.random_row(rng, f"{seed}-{i}") for i in range(2)]


def commit(store: Store, header: DatasetHeader, unit: int, *, seed: int | None = None) -> CommitRecord:
    rows = rows_of(unit if seed is None else seed)
    return commit_unit(store, unit, rows=rows, rejects=[], header=header, environment={})


def begin(url: str, header: DatasetHeader, tokenizer: Path) -> Store:
    return making.begin_dataset(url, header, tokenizer, [2] * UNITS)


@pytest.fixture
def unbroken_id(tmp_path: Path, header: DatasetHeader, tokenizer_folder: Path) -> str:
    store = begin(str(tmp_path / "unbroken"), header, tokenizer_folder)
    for unit in range(UNITS):
        commit(store, header, unit)
    seal(store)
    return open_dataset(store.url).dataset_id


def shard_names(store: Store) -> list[str]:
    return [f"shards/{name}" for name in store.names("shards")]


def test_what_another_process_wrote_after_a_listing_is_there(bucket: str) -> None:
    store = Store(f"s3://{bucket}/dataset")
    store.put("shards/first", b"1")
    assert store.names("shards") == ["first"]
    another = fsspec.filesystem("s3", skip_instance_cache=True)
    another.pipe_file(f"{bucket}/dataset/shards/second", b"2")
    for number, read in enumerate((store.read, store.size, store.open)):
        store.names("shards")
        another.pipe_file(f"{bucket}/dataset/shards/new-{number}", b"2")
        read(f"shards/new-{number}")
    assert store.read("shards/second") == b"2"
    with pytest.raises(FileNotFoundError):
        store.read("shards/third")


def test_put_replaces_create_does_not_and_delete_forgives(url: str) -> None:
    store = Store(url)
    store.require_writable()
    assert store.create("a/b", b"1")
    assert not store.create("a/b", b"2")
    assert store.read("a/b") == b"1"
    store.put("a/b", b"345")
    assert store.read("a/b") == b"345"
    assert store.size("a/b") == 3
    assert store.names("a") == ["b"]
    assert store.names("absent") == store.names(RUN_FOLDER) == []
    store.delete("a/b")
    store.delete("a/b")
    store.delete_folder("a")
    assert not store.exists("a/b")
    for read in (store.read, store.open, store.size):
        with pytest.raises(FileNotFoundError):
            read("a/b")


def test_of_many_creators_exactly_one_wins(url: str) -> None:
    contents = [str(i).encode() * 1000 for i in range(16)]
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda data: Store(url).create(commit_name(0), data), contents))
    assert sum(won) == 1
    assert Store(url).read(commit_name(0)) == contents[won.index(True)]


def test_a_whole_capture_has_the_same_id_as_on_a_local_disk(
    url: str, header: DatasetHeader, tokenizer_folder: Path, unbroken_id: str
) -> None:
    store = begin(url, header, tokenizer_folder)
    store.put(f"{RUN_FOLDER}/worker-0.json", b"{}")
    for unit in reversed(range(UNITS)):
        commit(store, header, unit)
    seal(store)
    dataset = open_dataset(url)
    assert dataset.dataset_id == unbroken_id
    assert [row.sample_id for row in dataset.rows()] == [
        row.sample_id for unit in range(UNITS) for row in rows_of(unit)
    ]
    assert verify(url, deep=True, progress=False) == []
    assert store.names(RUN_FOLDER) == []
    store.delete(dataset.shards[1].file.name)
    with pytest.raises(FileMissing):
        dataset.read_shard(1)


def test_a_zombies_late_commit_changes_nothing(url: str, header: DatasetHeader, tokenizer_folder: Path) -> None:
    store = begin(url, header, tokenizer_folder)
    first = commit(store, header, 0)
    assert commit(Store(url), header, 0, seed=99) == first == read_commit(store, 0)
    assert shard_names(store) == [first.shard.name]


@pytest.mark.parametrize("seed", [1, 99], ids=["equal rows", "other rows"])
def test_a_worker_killed_between_the_two_puts_of_a_commit_costs_one_unit(
    s3_server: S3Server,
    bucket: str,
    header: DatasetHeader,
    tokenizer_folder: Path,
    unbroken_id: str,
    seed: int,
) -> None:
    store = begin(f"s3://{bucket}/dataset", header, tokenizer_folder)
    commit(store, header, 0)
    held = s3_server.hold("PUT", commit_name(1))
    child = subprocess.Popen([sys.executable, "-c", WORKER, store.url, str(seed)], cwd=REPOSITORY)
    assert held.arrived.wait(60)
    child.kill()
    assert child.wait() == -9
    held.released.set()

    assert committed_units(store) == {0}
    assert len(shard_names(store)) == 2  # the killed worker's shard is there, and no record names it
    for unit in sorted(set(range(UNITS)) - committed_units(store)):
        commit(store, header, unit)
    manifest = seal(store)
    assert open_dataset(store.url).dataset_id == unbroken_id
    assert shard_names(store) == [shard.file.name for shard in manifest.shards]
    assert verify(store.url, progress=False) == []


def test_a_commit_whose_answer_was_lost_is_a_commit(
    s3_server: S3Server, bucket: str, header: DatasetHeader, tokenizer_folder: Path
) -> None:
    store = begin(f"s3://{bucket}/dataset", header, tokenizer_folder)
    s3_server.fail("PUT", commit_name(0), "500 Internal Server Error", "InternalError", applied=True)
    record = commit(store, header, 0)
    assert record == read_commit(store, 0)
    assert shard_names(store) == [record.shard.name]


def test_a_store_that_is_busy_is_asked_again(s3_server: S3Server, bucket: str) -> None:
    store = Store(f"s3://{bucket}/dataset")
    s3_server.fail("PUT", "/a", "503 Slow Down", "SlowDown", times=2)
    store.put("a", b"1")
    s3_server.fail("PUT", "/b", "409 Conflict", "ConditionalRequestConflict", times=2)
    assert store.create("b", b"1")
    assert (store.read("a"), store.read("b")) == (b"1", b"1")


def test_a_store_that_does_not_say_which_condition_failed_is_understood(s3_server: S3Server, bucket: str) -> None:
    s3_server.fail("PUT", "/a", "412 Precondition Failed", "PreconditionFailed")
    assert not Store(f"s3://{bucket}/dataset").create("a", b"1")


def test_a_store_that_ignores_the_condition_of_a_create_is_refused(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"s3://{bucket}/dataset")
    pipe = store.fs._pipe_file

    async def ignoring(path: str, data: bytes, mode: str = "overwrite") -> object:
        return await pipe(path, data)

    monkeypatch.setattr(store.fs, "pipe_file", lambda *args, **kwargs: fsspec.asyn.sync(store.fs.loop, ignoring, *args))
    with pytest.raises(UnsupportedStore, match="only if it is absent"):
        store.require_writable()
    assert store.names(RUN_FOLDER) == []


def test_google_is_asked_to_create_only_what_is_absent() -> None:
    pytest.importorskip("gcsfs")
    server = HTTPServer(("127.0.0.1", 0), GoogleUploads)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    script = (
        "from coldstill.storage_schema.store import Store; store = Store('gs://bucket/dataset')\n"
        "print(store.create('a', b'1'), store.create('a', b'2'), store.put('a', b'3'))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.server_port}",
            "FSSPEC_GS_TOKEN": "anon",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks over gRPC what kind of bucket this is
        },
        capture_output=True,
        text=True,
    )
    server.shutdown()
    server.server_close()
    assert answer.stdout.split() == ["True", "False", "None"], answer.stderr
    conditions = ["ifGenerationMatch=0" in path for path in server.asked]  # type: ignore[attr-defined]
    assert conditions == [True, True, False]


def test_a_file_is_read_by_ranges(
    s3_server: S3Server, bucket: str, header: DatasetHeader, tokenizer_folder: Path
) -> None:
    store = begin(f"s3://{bucket}/dataset", header, tokenizer_folder)
    name = commit(store, header, 0).shard.name
    data = store.read(name)
    with store.open(name) as file:
        assert file.seekable()
        assert file.seek(-4, io.SEEK_END) == len(data) - 4
        assert file.read() == b"PAR1"
        assert file.seek(7) == 7
        assert file.tell() == 7
        assert file.read(9) == data[7:16]
        buffer = bytearray(5)
        assert file.readinto(buffer) == 5  # type: ignore[attr-defined]
        assert bytes(buffer) == data[16:21]
        assert pq.ParquetFile(file).metadata.num_rows == 2
    with store.open(name) as first, store.open(name) as second:
        first.read(10)
        assert second.tell() == 0


def test_a_large_file_is_not_read_whole(s3_server: S3Server, bucket: str) -> None:
    store = Store(f"s3://{bucket}/dataset")
    data = np.random.default_rng(0).bytes(8 << 20)
    store.put("large", data)
    with store.open("large") as file:
        file.seek(5 << 20)
        assert file.read(100) == data[5 << 20 : (5 << 20) + 100]
        held = len(file._file.cache.cache)  # type: ignore[attr-defined]
    assert 100 <= held <= 2 << 20


def test_an_empty_object_that_stands_for_a_folder_is_no_file(bucket: str) -> None:
    store = Store(f"s3://{bucket}/dataset")
    fsspec.filesystem("s3").pipe_file(f"{bucket}/dataset/shards/", b"")
    store.put("shards/a", b"1")
    assert store.names("shards") == ["a"]


def test_a_refused_push_to_a_bucket_resumes_and_a_pull_gives_the_same_dataset(
    s3_server: S3Server, bucket: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/published"
    dataset = open_dataset(tiny_dataset)
    s3_server.fail("PUT", dataset.shards[2].file.name, "403 Forbidden", "AccessDenied")
    with pytest.raises(AccessDenied, match="writing shards"):
        push(tiny_dataset, url, progress=False)
    with pytest.raises(DatasetNotSealed):
        open_dataset(url)

    s3_server.forget()
    pushed = push(tiny_dataset, url, progress=False)
    assert 1 <= pushed.files < len(dataset_files(dataset))
    puts = [path.removeprefix(f"/{bucket}/published/") for method, path in s3_server.requests if method == "PUT"]
    of_card = {*CARD_FILES}  # the dataset has none: the push makes them
    assert of_card < set(puts)
    assert len(puts) == len(set(puts)) == pushed.files + 1 + len(of_card)
    assert puts[-1] == MANIFEST_NAME

    assert pull(url, tmp_path / "copy", progress=False).dataset_id == dataset.dataset_id
    assert verify(tmp_path / "copy", deep=True, progress=False) == []
    assert push(url, f"s3://{bucket}/again", progress=False).dataset_id == dataset.dataset_id


def test_a_large_file_goes_in_parts(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(120 << 20))
    Store(f"s3://{bucket}").upload("large", tmp_path / "large")
    assert Store(f"s3://{bucket}").size("large") == 120 << 20
    assert sum(method == "PUT" for method, _ in s3_server.requests) > 1
