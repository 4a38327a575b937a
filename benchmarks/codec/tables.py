"""Tables, JSON lines and the headline of the codec's benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.codec.cases import FIDELITIES, FLOOR, NAIVE
from benchmarks.codec.ours import RANKED
from benchmarks.codec.peer import recommended_polynomials
from benchmarks.codec.sides import GuaranteeBroken, Measured
from benchmarks.inputs.small_language_model import VOCABULARY
from benchmarks.inputs.teacher_distributions import SHARPNESSES
from benchmarks.inputs.teacher_rows import DRAWS

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


def headline(lines: list[Measured]) -> dict[str, Any]:
    """The figures to compare between releases: the worse of flat and sharp, and both.

    Bytes are those with an id rank table, which a capture writes by default. Speeds are those without one.
    """
    ratios = {t: _ratio_to_peer(lines, t, suffix=RANKED) for t in SHARPNESSES}
    unranked = {t: _ratio_to_peer(lines, t) for t in SHARPNESSES}
    plain = {t: _line(lines, "ours, fine", t, 64) for t in SHARPNESSES}
    shard = {t: _line(lines, "ours, fine, shard", t, 64) for t in SHARPNESSES}
    default = {t: _line(lines, f"ours, fine{RANKED}", t, 16, min_prob=FLOOR, draws=DRAWS) for t in SHARPNESSES}
    naive = {t: _line(lines, NAIVE, t, 64) for t in SHARPNESSES}
    split = {t: _line(lines, f"{NAIVE}, BYTE_STREAM_SPLIT", t, 64) for t in SHARPNESSES}
    over_naive = {t: _times_faster(shard[t], naive[t]) for t in SHARPNESSES}
    return {
        "bytes_ratio_to_peer": max(ratios.values()),
        "bytes_ratio_to_peer_by_teacher": ratios,
        "bytes_ratio_to_peer_without_id_ranks_by_teacher": unranked,
        "bytes_default": {t: round(default[t].bytes_per_target, 2) for t in SHARPNESSES},
        "decode_over_naive": min(over_naive.values()),
        "decode_over_naive_by_teacher": over_naive,
        "decode_over_naive_from_frames_by_teacher": {t: _times_faster(plain[t], naive[t]) for t in SHARPNESSES},
        "decode_over_byte_stream_split_by_teacher": {t: _times_faster(shard[t], split[t]) for t in SHARPNESSES},
        "decode_targets_per_s": round(min(_decode(line) for line in plain.values())),
        "decode_targets_per_s_from_shard": round(min(_decode(line) for line in shard.values())),
    }


def _times_faster(line: Measured, other: Measured) -> float:
    """How many times as fast `line` decodes: median of the rounds' own ratios, so both sides had the same load."""
    return round(statistics.median(a / b for a, b in zip(line.decode_rates, other.decode_rates, strict=True)), 3)


def _ratio_to_peer(lines: list[Measured], sharpness: str, *, suffix: str = "") -> float:
    """Bytes of our smallest preset with at most the peer's mean KL, divided by the peer's raw bytes, at K = 128."""
    peer = recommended_polynomials(VOCABULARY)[0]
    theirs = _line(lines, peer.name, sharpness, peer.top_k)
    ours = [_line(lines, f"ours, {fidelity}{suffix}", sharpness, peer.top_k) for fidelity in FIDELITIES]
    faithful = [line.bytes_per_target for line in ours if line.kl.mean() <= theirs.kl.mean()]
    if not faithful:
        raise GuaranteeBroken(
            f"K={peer.top_k}, {sharpness}", found="a KL above the peer's", wanted="at most the peer's"
        )
    return round(min(faithful) / peer.raw_bytes, 4)


def _line(
    lines: Iterable[Measured], name: str, sharpness: str, top_k: int, *, min_prob: float = 0.0, draws: int = 0
) -> Measured:
    wanted = (name, sharpness, top_k, min_prob, draws)
    return next(line for line in lines if key_of(line) == wanted)


def _decode(line: Measured) -> float:
    return statistics.median(line.decode_rates)
