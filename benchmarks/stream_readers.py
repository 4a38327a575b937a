"""Work of the loader by its number of processes: 1, 2 and 4 workers on 1 and 2 ranks of one machine.

    python -m benchmarks.stream_readers [--output FILE]
    QUICK=1 ...                                  fewer shards and rounds

Each turn reads one epoch of a local dataset, packed, with an empty cache folder: the ranks are processes that start
together, each with its DataLoader. Sides take turns. Measured are target positions per second, those per second of
CPU time of all processes, bytes hashed, bytes read by system calls, and row groups of which the frames were decoded.
The rows are random (V = 64, K = 16, 8 draws, 256 to 511 tokens): the work of reading them is that of a teacher's.

Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.common.report import hardware, versions
from tests import making

SIDES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
"""Workers of each rank, and ranks."""
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


def measured(*, shards: int, rounds: int) -> dict[str, Any]:
    """The figures of all sides, after one warm-up round."""
    counts = Counts()
    count_work(counts)
    turns: dict[tuple[int, int], list[Turn]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), shards=shards)
        stored = sum(file.stat().st_size for file in Path(path, "shards").iterdir())
        for number in range(rounds + 1):
            for side in SIDES:
                found = turn(path, *side, counts)
                if number:
                    turns[side].append(found)
    if len({found.targets for sides in turns.values() for found in sides}) != 1:
        raise SystemExit("benchmark failed: sides read different numbers of targets")
    return {"shards": shards, "bytes_stored": stored, "rounds": rounds, "lines": [_line(*of) for of in turns.items()]}


def _line(side: tuple[int, int], turns: list[Turn]) -> dict[str, Any]:
    def spread(values: list[float]) -> list[int]:
        return [round(function(values)) for function in (statistics.median, min, max)]

    return {
        "workers": side[0],
        "ranks": side[1],
        "targets_per_s": spread([found.targets / found.wall_s for found in turns]),
        "targets_per_cpu_s": spread([found.targets / found.cpu_ns * 1e9 for found in turns]),
        "bytes_hashed": round(statistics.median(found.hashed for found in turns)),
        "bytes_read": round(statistics.median(found.read for found in turns)),
        "row_groups_decoded": round(statistics.median(found.groups for found in turns)),
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """Print a table."""
    columns = ("workers x ranks", "targets per second", "per CPU second", "MB hashed", "MB read", "row groups")
    title = f"{figures['shards']} shards of one row group, {figures['bytes_stored'] / 1e6:.1f} MB"
    table = Table(*columns, title=title)
    for line in figures["lines"]:
        rates = ["{:,} ({:,} to {:,})".format(*line[name]) for name in ("targets_per_s", "targets_per_cpu_s")]
        sizes = [f"{line[name] / 1e6:.1f}" for name in ("bytes_hashed", "bytes_read")]
        table.add_row(f"{line['workers']} x {line['ranks']}", *rates, *sizes, str(line["row_groups_decoded"]))
    console.print(table)


def main() -> None:
    """Measure, print, and write the figures to a file if one is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    figures = measured(shards=8 if quick else 16, rounds=2 if quick else 3)
    show(figures, Console(width=None if Console().is_terminal else 160))
    document = {**figures, "quick": quick, "versions": versions(), "hardware": hardware()}
    if options.output is not None:
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
