"""One epoch of a dataset by several ranks and workers, with counts of the work of all their processes."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from tests import making

ROWS_OF_SHARD = 60
COUNTS = ("targets", "hashed", "read", "groups", "cpu_ns")
_CONTEXT = multiprocessing.get_context("fork")


class Turn(NamedTuple):
    """One epoch by all ranks."""

    targets: int
    hashed: int
    read: int
    groups: int
    cpu_ns: int
    wall_s: float


def write(folder: Path, *, shards: int) -> str:
    """A sealed dataset of random rows, one row group per shard."""
    rng = np.random.default_rng(0)
    tokenizer = making.tiny_tokenizer(folder / "tokenizer")
    rows = [
        [
            making.random_row(rng, f"{shard}-{row}", top_k=16, draws=8, length=int(rng.integers(256, 512)))
            for row in range(ROWS_OF_SHARD)
        ]
        for shard in range(shards)
    ]
    header = making.tiny_header(tokenizer, top_k=16, draws=8, max_length=1024)
    making.write_dataset(folder / "dataset", rows, header=header, tokenizer=tokenizer)
    return str(folder / "dataset")


class Counts:
    """Sums over this process and those that it forks."""

    def __init__(self) -> None:
        self._values = {name: _CONTEXT.Value("q", 0) for name in COUNTS}

    def add(self, name: str, amount: int) -> None:
        """Add to a sum."""
        with self._values[name].get_lock():
            self._values[name].value += amount

    def take(self) -> dict[str, int]:
        """The sums, which begin at zero again."""
        found = {name: value.value for name, value in self._values.items()}
        for value in self._values.values():
            value.value = 0
        return found


def count_work(counts: Counts) -> None:
    """Count what the functions of hashing and of reading row groups do, in this process and its children."""
    import pyarrow.parquet as pq

    from coldstill.storage_schema import verified_files

    digest, read = verified_files._digest, pq.ParquetFile.read_row_group

    def counted_digest(*values: Any, **options: Any) -> Any:
        found = digest(*values, **options)
        counts.add("hashed", found[0])
        return found

    def counted_read(self: Any, group: int, columns: Any = None, **options: Any) -> Any:
        if columns is None:
            counts.add("groups", 1)
        return read(self, group, columns=columns, **options)

    verified_files._digest = counted_digest
    pq.ParquetFile.read_row_group = counted_read


class Measured(IterableDataset):
    """A stream that counts the CPU time and the bytes read of the process that iterates over it."""

    def __init__(self, stream: Any, counts: Counts):
        self._stream, self._counts = stream, counts

    def __iter__(self) -> Iterator[int]:
        cpu, read = time.process_time_ns(), _bytes_read()
        for batch in self._stream:
            yield batch["targets"].count
        self._counts.add("cpu_ns", time.process_time_ns() - cpu)
        self._counts.add("read", _bytes_read() - read)


def _bytes_read() -> int:
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["rchar"])


def _rank(path: str, cache: str, rank: int, ranks: int, workers: int, counts: Counts, barrier: Any) -> None:
    from coldstill.trainer.data.logit_dataset import load_logit_dataset

    warnings.filterwarnings("ignore", message="This DataLoader will create")
    stream = load_logit_dataset(path, cache_dir=cache).stream(
        batch_size=2, pack_length=2048, seed=0, epochs=1, rank=rank, world_size=ranks
    )
    barrier.wait()
    loader = DataLoader(Measured(stream, counts), batch_size=None, num_workers=workers)
    counts.add("targets", sum(loader))
    barrier.wait()


def turn(path: str, workers: int, ranks: int, counts: Counts) -> Turn:
    """Read one epoch."""
    with tempfile.TemporaryDirectory() as cache:
        barrier = _CONTEXT.Barrier(ranks + 1)
        processes = [
            _CONTEXT.Process(target=_rank, args=(path, cache, rank, ranks, workers, counts, barrier))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        barrier.wait()
        began = time.perf_counter()
        barrier.wait()
        wall_s = time.perf_counter() - began
        for process in processes:
            process.join()
        return Turn(**counts.take(), wall_s=wall_s)
