"""The study that chose the codec's grids and rank table; prints two tables.

Grids are levels q(x) = floor(a (1 - exp(-x / 2)) + b x + 1/2) of x = -logprob, with a = c sqrt(K). They are stored in
set order (ascending ids), relative to the position's last level, as one byte per entry with an escape at 255, in one
zstd frame per row. Ranks are the sorted deltas of ids under tables counted on other documents. The study uses numpy
only, not the codec that it configures.

With b = 0 a step at x has length 2 exp(x / 2) / a, so probability times its square is 4 / a^2 for every value. Mean KL
is then K / (6 a^2) = 1 / (6 c^2) for any distribution and any K, if rounding errors are uniform (a second-order
expansion; renormalization removes one of K + 1 terms). b > 0 only lowers it: c = 130 gives 1e-5 and c = 41 gives 1e-4.

Shape letters: `P` rows, `N` target positions of a row, `K` kept ids, `L` levels.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import zstandard
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.codec.fidelity import kl_nats
from benchmarks.inputs.small_language_model import VOCABULARY
from benchmarks.inputs.teacher_distributions import Distributions
from benchmarks.inputs.teacher_rows import WideRow

TOP_KS = (16, 64, 128)
SCALES = (16, 20, 24, 28, 32, 36, 41, 64, 96, 112, 120, 130)
SLOPES = (1, 2, 3, 4, 6, 8)
TARGETS = {"coarse": 1e-4, "fine": 1e-5}
PARTIAL_TABLES = (1024, 4096, 16384)


@dataclass(frozen=True, kw_only=True)
class GridFigures:
    """Cost and loss of one grid: bytes per target of all level streams, order-0 bits per value, mean KL in nats."""

    level_bytes: float
    bits: float
    kl: float


def study(distributions: dict[str, Distributions], *, every: int, console: Console) -> None:
    """Print both tables, measured on every `every`-th test row."""
    rows = {name: found.test[::every] for name, found in distributions.items()}
    for top_k in TOP_KS:
        console.print(_grid_table(rows, top_k))
    console.print(_rank_table(distributions, rows))


def _grid_table(rows: dict[str, list[WideRow]], top_k: int) -> Table:
    grids = list(itertools.product(SCALES, SLOPES))
    sets = {name: _sets(found, top_k) for name, found in rows.items()}
    figures = {
        (c, b): {name: _measure(*found, a=c * math.sqrt(top_k), b=b) for name, found in sets.items()}
        for c, b in tqdm(grids, desc=f"K={top_k}", unit="grid")
    }
    best = {
        name: min(
            (grid for grid in grids if max(side.kl for side in figures[grid].values()) < limit),
            key=lambda grid: sum(side.level_bytes for side in figures[grid].values()),
            default=None,
        )
        for name, limit in TARGETS.items()
    }
    columns = [f"{name} {what}" for name in rows for what in ("bytes", "bits/value", "mean KL")]
    table = Table("c", "b", *columns, "cheapest", title=f"K={top_k}: grids, a = c sqrt(K)")
    for (c, b), sides in figures.items():
        cells = [cell for s in sides.values() for cell in (f"{s.level_bytes:.2f}", f"{s.bits:.3f}", f"{s.kl:.2e}")]
        table.add_row(str(c), str(b), *cells, " ".join(name for name, grid in best.items() if grid == (c, b)))
    return table


def _sets(rows: list[WideRow], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """`-logprobs float64 [P, N, K]` in the order of ids, and `-log_tail [P, N]`, for `top_k` kept ids."""
    order = np.argsort(np.stack([row.targets.ids[:, :top_k] for row in rows]), axis=-1)
    surprise = -np.stack([row.targets.logprobs for row in rows]).astype(np.float64)
    tail = np.exp(np.stack([row.targets.log_tail for row in rows]).astype(np.float64))
    tail += np.exp(-surprise[:, :, top_k:]).sum(-1)
    return np.take_along_axis(surprise[:, :, :top_k], order, -1), -np.log(tail)


def _measure(surprise: np.ndarray, tail: np.ndarray, *, a: float, b: float) -> GridFigures:
    def level(x: np.ndarray) -> np.ndarray:
        return np.floor(a * (1 - np.exp(-x / 2)) + b * x + 0.5).astype(np.int64)

    levels, tails = level(surprise), level(tail)
    values = inverse_grid(int(max(levels.max(), tails.max())) + 1, a=a, b=b)
    last = levels.max(-1)
    relative = last[..., None] - levels
    size = sum(
        _escaped_bytes(row) + _frame(_planes(top)) + _frame(_planes(end))
        for row, top, end in zip(relative, last, tails, strict=True)
    )
    counts = np.bincount(relative.reshape(-1)).astype(np.float64)
    share = counts[counts > 0] / counts.sum()
    exact, stored = (
        -np.concatenate([surprise, tail[..., None]], -1),
        values[np.concatenate([levels, tails[..., None]], -1)],
    )
    kl = kl_nats(exact.reshape(-1, exact.shape[-1]), stored.reshape(-1, exact.shape[-1]))
    return GridFigures(level_bytes=size / tail.size, bits=float(-(share * np.log2(share)).sum()), kl=float(kl.mean()))


def inverse_grid(count: int, *, a: float, b: float) -> np.ndarray:
    """`-x float64 [L]` with a (1 - exp(-x / 2)) + b x = level, for each level below `count`; found by bisection."""
    level = np.arange(count, dtype=np.float64)
    low, high = np.zeros(count), level / b + 1
    for _ in range(60):
        middle = (low + high) / 2
        below = a * (1 - np.exp(-middle / 2)) + b * middle < level
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return -(low + high) / 2


def _rank_table(distributions: dict[str, Distributions], rows: dict[str, list[WideRow]]) -> Table:
    table = Table("K", "ranks", *rows, title="zstd bytes per target of the sorted deltas of ids")
    for top_k in TOP_KS:
        counts = _kept_counts(distributions["flat"].calibration, top_k)
        ranks = {"identity": np.arange(VOCABULARY), "by count, all ids": _ranks(counts, VOCABULARY)}
        ranks |= {f"by count, the first {size}": _ranks(counts, size) for size in PARTIAL_TABLES}
        for name, rank in ranks.items():
            sizes = (_id_bytes(found, rank, top_k) for found in rows.values())
            table.add_row(str(top_k), name, *(f"{size:.2f}" for size in sizes))
    return table


def _kept_counts(rows: list[WideRow], top_k: int) -> np.ndarray:
    return np.bincount(np.concatenate([row.targets.ids[:, :top_k].reshape(-1) for row in rows]), minlength=VOCABULARY)


def _ranks(counts: np.ndarray, size: int) -> np.ndarray:
    """Rank of each id: the `size` most frequent ones by count, then all others by id."""
    order = np.argsort(-counts, kind="stable")
    order[size:].sort()
    ranks = np.empty_like(order)
    ranks[order] = np.arange(order.size)
    return ranks


def _id_bytes(rows: list[WideRow], ranks: np.ndarray, top_k: int) -> float:
    size, positions = 0, 0
    for row in rows:
        sets = np.sort(ranks[row.targets.ids[:, :top_k]], axis=1)
        size += _escaped_bytes(np.diff(sets, axis=1, prepend=-1) - 1)
        positions += len(sets)
    return size / positions


def _escaped_bytes(values: np.ndarray) -> int:
    """One byte per value; values of 255 and more follow in two planes."""
    return _frame(np.minimum(values, 255).astype(np.uint8)) + _frame(_planes(values[values >= 255] - 255))


def _planes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype("<u2").view(np.uint8).reshape(-1, 2).T)


def _frame(values: np.ndarray) -> int:
    return len(zstandard.ZstdCompressor(level=3, write_checksum=True).compress(values.tobytes())) if values.size else 0
