"""Tables and JSON lines of the codec's benchmark."""

from __future__ import annotations

import statistics
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.codec_sides import Measured

_ESCAPES = {"id_escapes": "ids", "logprob_escapes": "logprobs"}


def key_of(line: Measured) -> tuple[str, str, int, float, int]:
    """Identity of a line: side, sharpness, K, floor, draws."""
    case, limits = line.side.case, line.side.case.limits
    return line.side.name, case.sharpness, limits.top_k, limits.min_prob, limits.draws


def figures(line: Measured) -> dict[str, Any]:
    """One line as stored: KL in nats, speeds in targets/s (median, slowest and fastest round)."""
    name, sharpness, top_k, min_prob, draws = key_of(line)
    mean, (p50, p99, worst) = line.kl.mean(), np.percentile(line.kl, (50, 99, 100))
    speeds = {"encode": line.encode_rates, "decode": line.decode_rates}
    return {
        "side": name,
        "teacher": sharpness,
        "top_k": top_k,
        "min_prob": min_prob,
        "draws": draws,
        "bytes": round(line.bytes_per_target, 3),
        "streams": {stream: round(size, 3) for stream, size in line.streams.items() if size},
        "kl": {key: float(f"{kl:.4g}") for key, kl in (("mean", mean), ("p50", p50), ("p99", p99), ("max", worst))},
        **{f"{what}_targets_per_s": [round(f(r)) for f in (statistics.median, min, max)] for what, r in speeds.items()},
    }


def print_tables(lines: list[Measured], console: Console) -> None:
    """Print a table of all sides for each K and teacher, and one of our streams."""
    for group_of, group in groupby(lines, key=lambda line: key_of(line)[1:3]):
        title = "{} teacher, K={}".format(*group_of)
        console.print(_sides_table([figures(line) for line in group], title=title))
    console.print(_streams_table([figures(line) for line in lines]))


def _sides_table(group: list[dict[str, Any]], *, title: str) -> Table:
    columns = ("side", "floor", "D", "bytes", "encode k/s", "decode k/s", "KL mean", "p50", "p99", "max")
    table = Table(*columns, title=title, caption="speeds: median (slowest to fastest round)")
    for line in group:
        speeds = (
            "{:.0f} ({:.0f}-{:.0f})".format(*(rate / 1000 for rate in line[f"{what}_targets_per_s"]))
            for what in ("encode", "decode")
        )
        kl = (f"{line['kl'][key]:.1e}" for key in ("mean", "p50", "p99", "max"))
        limits = (f"{line['min_prob']:g}" if line["min_prob"] else "", str(line["draws"] or ""))
        table.add_row(line["side"], *limits, f"{line['bytes']:.1f}", *speeds, *kl)
    return table


def _streams_table(group: list[dict[str, Any]]) -> Table:
    """Streams of our codec. Escapes count with their stream, and all streams of draws together."""
    columns = ("ids", "logprobs", "last_levels", "log_tail", "label_logprob", "counts", "draws")
    table = Table("side", "teacher", "K", "floor", "D", "all", *columns, title="bytes per target by stream")
    for line in group:
        if not line["side"].startswith("ours") or "shard" in line["side"]:
            continue
        sizes = dict.fromkeys(columns, 0.0)
        for stream, size in line["streams"].items():
            sizes["draws" if stream.startswith("draw") else _ESCAPES.get(stream, stream)] += size
        limits = (f"{line['min_prob']:g}" if line["min_prob"] else "", str(line["draws"] or ""))
        cells = (f"{line['bytes']:.2f}", *(f"{size:.2f}" if size else "" for size in sizes.values()))
        table.add_row(line["side"], line["teacher"], str(line["top_k"]), *limits, *cells)
    return table
