"""The sides of the loader's benchmark, each in a child process that waits for its turn.

In a turn, a side reads all stored data once and returns the number of targets. Measured are the CPU seconds of its
process, with all threads, and the wall time. All processes run on one core.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.stream.data import Stored

BATCH_ROWS = 8
PACKED_ROWS = 4
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "benchmarks.stream.sides",
    "benchmarks.codec.rivals",
    "pandas",
    "s3fs",
    "torch",
    "coldstill.trainer.data.logit_dataset",
]
"""Modules that are imported once for all sides, because an import of torch takes longer than a turn."""


class Turn(NamedTuple):
    """The result of one turn: target positions, CPU seconds, wall seconds."""

    targets: int
    cpu_s: float
    wall_s: float


def decode(path: str) -> int:
    """Decode shards on disk to the targets of each row."""
    from coldstill.storage_schema.dataset import open_dataset

    return sum(row.targets.positions for row in open_dataset(path).rows())


def decode_naive(stored: Stored) -> int:
    """Decode naive lists on disk to the arrays of each row."""
    from benchmarks.codec.rivals import NaiveLists

    lists = NaiveLists(top_k=stored.top_k)
    pieces = (path.read_bytes() for path in sorted(stored.naive.glob("*.lists")))
    return sum(row.log_tail.size for piece in pieces for row in lists.decode([piece]))


def load(path: str, *, pack_length: int | None = None) -> int:
    """Run the whole loader, to shuffled batches of tensors. Remote shards are copied into a new folder each time."""
    from coldstill.trainer.data.logit_dataset import load_logit_dataset

    with tempfile.TemporaryDirectory() as cache:
        stream = load_logit_dataset(path, cache_dir=cache).stream(
            batch_size=BATCH_ROWS if pack_length is None else BATCH_ROWS // PACKED_ROWS,
            seed=0,
            epochs=1,
            pack_length=pack_length,
        )
        return sum(batch["targets"].count for batch in stream)


def load_naive(stored: Stored) -> int:
    """Make the same batches from naive lists: one file in memory at a time, with its rows shuffled."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from benchmarks.codec.rivals import NaiveLists

    lists, targets = NaiveLists(top_k=stored.top_k), 0
    for path in sorted(stored.naive.glob("*.lists")):
        rows = list(lists.decode([path.read_bytes()]))
        table = pq.read_table(path.with_suffix(".tokens"), use_threads=False)
        tokens, label_logprobs = (table.column(name).combine_chunks() for name in ("tokens", "label_logprob"))
        order = np.random.default_rng(0).permutation(len(rows))
        for start in range(0, len(rows), BATCH_ROWS):
            chosen = order[start : start + BATCH_ROWS].tolist()
            batch = {
                "input_ids": torch.from_numpy(np.stack([tokens[n].values.to_numpy() for n in chosen]).astype(np.int64)),
                "ids": torch.from_numpy(np.concatenate([rows[n].ids for n in chosen]).astype(np.int64)),
                "logprobs": torch.from_numpy(np.concatenate([rows[n].logprobs for n in chosen])),
                "log_tail": torch.from_numpy(np.concatenate([rows[n].log_tail for n in chosen])),
                "label_logprob": torch.from_numpy(
                    np.concatenate([label_logprobs[n].values.to_numpy() for n in chosen])
                ),
            }
            targets += len(batch["log_tail"])
    return targets


def sides_of(stored: Stored, bucket: str) -> dict[str, tuple[Callable[..., int], dict[str, Any]]]:
    """Side -> its function and arguments. `bucket` is the address of `drawn` on the S3 server."""
    from benchmarks.inputs.small_language_model import CONTEXT

    return {
        "decode, K ids": (decode, {"path": stored.plain}),
        "decode, floor and draws": (decode, {"path": stored.drawn}),
        "decode, naive lists of K ids": (decode_naive, {"stored": stored}),
        "loader, K ids": (load, {"path": stored.plain}),
        "loader, floor and draws": (load, {"path": stored.drawn}),
        "loader, floor and draws, packed": (load, {"path": stored.drawn, "pack_length": PACKED_ROWS * (CONTEXT + 1)}),
        "loader, floor and draws, S3": (load, {"path": bucket}),
        "loader, naive lists of K ids": (load_naive, {"stored": stored}),
    }


class SideProcess:
    """A side in a process that does nothing until `turn` is called."""

    def __init__(self, work: Callable[..., int], arguments: dict[str, Any], *, core: int):
        _CONTEXT.set_forkserver_preload(_PRELOADED)
        self._pipe, there = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(there, work, arguments, core), daemon=True)
        self._process.start()

    def turn(self) -> Turn:
        """Run the side once."""
        self._pipe.send(True)
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return Turn(*answer)

    def close(self) -> None:
        """End the process."""
        self._pipe.send(False)
        self._process.join()


def _serve(pipe: Connection, work: Callable[..., int], arguments: dict[str, Any], core: int) -> None:
    import pyarrow as pa

    os.sched_setaffinity(0, {core})
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    while pipe.recv():
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            targets = work(**arguments)
        except Exception as error:
            pipe.send(error)
            continue
        pipe.send((targets, time.process_time() - cpu, time.perf_counter() - wall))


@contextmanager
def s3_server() -> Iterator[None]:
    """Run the tests' S3 server in a child process. The environment points to it, also for processes started later."""
    spawned = multiprocessing.get_context("spawn")
    pipe, there = spawned.Pipe()
    process = spawned.Process(target=_serve_s3, args=(there,), daemon=True)
    process.start()
    settings = {"AWS_ENDPOINT_URL": pipe.recv(), "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    os.environ.update({**settings, "AWS_DEFAULT_REGION": "us-east-1"})
    try:
        yield
    finally:
        pipe.send(None)
        process.join()


def _serve_s3(pipe: Connection) -> None:
    from tests.storage_schema.store.s3_server import S3Server

    server = S3Server()
    pipe.send(server.url)
    pipe.recv()
    server.stop()


def upload(folder: str, address: str) -> None:
    """Put a dataset on the S3 server."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(address)
    fs.makedirs(root.split("/")[0], exist_ok=True)
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            fs.put_file(str(path), f"{root}/{path.relative_to(folder)}")
