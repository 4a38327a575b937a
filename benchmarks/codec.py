"""Bytes, speed and loss of the codec and of other codecs, on the same tokens in one run.

    python -m benchmarks.codec [--cache DIR]        the first run trains the teacher, about ten minutes
    python -m benchmarks.codec --grid-study         how the codec's grids and rank table were chosen
    QUICK=1 ...                                     a fifth of the rows, three rounds; nothing is stored

Our codec runs at several K, fine and coarse, with and without a floor and draws, from frames in memory and from a
shard. `codec_rivals.py` has the others; `teacher_distributions.py` has the two teachers, flat and sharp. Speeds are CPU
time of one thread; sides take turns in every round. KL is that of the exact distribution over kept ids and tail to the
stored one. The run fails if a decoded set, mass or mean KL breaks the header's promise.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from tqdm import tqdm

from benchmarks.codec_ours import RANKED, Fidelity, our_sides, rival_side
from benchmarks.codec_peer import recommended_polynomials
from benchmarks.codec_rivals import BitPacked, NaiveLists, Rival
from benchmarks.codec_sides import Case, GuaranteeBroken, Measured, Side, measure
from benchmarks.codec_tables import figures, key_of, print_tables
from benchmarks.report import finish
from benchmarks.small_language_model import VOCABULARY
from benchmarks.teacher_distributions import SHARPNESSES, Distributions, load_distributions
from benchmarks.teacher_rows import DRAWS, Limits, narrowed
from coldstill.common.errors import ColdstillError

CACHE = Path(__file__).parent.parent / ".bench_cache"
TOP_KS = (16, 32, 50, 64, 128)
"""50 is there only for the smaller setting of the peer."""

FIDELITIES: tuple[Fidelity, ...] = ("fine", "coarse")
FLOOR = 1e-4
MOST_RANKS = 4096
QUICK_EVERY = 5

NAIVE = "naive Parquet lists"


def cases(distributions: Distributions, *, sharpness: str, top_k: int, every: int) -> list[Case]:
    """Cases with and without the floor, with and without draws. K = 50 has only the plain one."""
    limits = [Limits(top_k=top_k, min_prob=floor, draws=draws) for floor in (0.0, FLOOR) for draws in (0, DRAWS)]
    return [
        Case(sharpness=sharpness, limits=limit, rows=[narrowed(row, limit) for row in distributions.test[::every]])
        for limit in (limits[:1] if top_k == 50 else limits)
    ]


def sides_of(found: list[Case], *, id_ranks: tuple[int, ...]) -> list[Side]:
    """All sides of one sharpness and K. Other codecs and `exact` run on the plain case only."""
    plain = found[0]
    sides = [side for case in found for fidelity in FIDELITIES for side in our_sides(case, fidelity)]
    sides += our_sides(plain, "exact", shard=False)
    # The gain of the rank table at both ends: no limit, and all limits.
    for case in dict.fromkeys((plain, found[-1])):
        sides += [side for fidelity in FIDELITIES for side in our_sides(case, fidelity, id_ranks=id_ranks, shard=False)]
    top_k = plain.limits.top_k
    rivals: list[Rival] = [NaiveLists(top_k=top_k), NaiveLists(top_k=top_k, byte_stream_split=True)]
    rivals.append(BitPacked(top_k=top_k, vocabulary=VOCABULARY))
    for peer in recommended_polynomials(VOCABULARY):
        rivals.extend([peer, replace(peer, tail=True)] if peer.top_k == top_k else [])
    return sides + [rival_side(plain, rival) for rival in rivals]


def frequent_ids(distributions: Distributions, top_k: int) -> tuple[int, ...]:
    """The ids that are kept most often at the calibration positions, most frequent first."""
    kept = np.concatenate([row.targets.ids[:, :top_k].reshape(-1) for row in distributions.calibration])
    return tuple(np.argsort(-np.bincount(kept, minlength=VOCABULARY), kind="stable")[:MOST_RANKS].tolist())


def run(distributions: dict[str, Distributions], *, every: int, rounds: int) -> list[Measured]:
    """Measure all lines of the tables."""
    lines = []
    for sharpness, top_k in tqdm([(t, k) for k in TOP_KS for t in SHARPNESSES], desc="codecs", unit="group"):
        found = cases(distributions[sharpness], sharpness=sharpness, top_k=top_k, every=every)
        ranks = frequent_ids(distributions[sharpness], top_k)
        lines.extend(measure(sides_of(found, id_ranks=ranks), rounds=rounds))
    return lines


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


def main() -> None:
    """Measure, print, and store a full run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the teacher for later runs")
    parser.add_argument("--grid-study", action="store_true", help="print the study of grids and rank tables instead")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    # CPU time is that of the whole process, so no side may use more than one thread.
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    distributions = load_distributions(options.cache)
    console = Console(width=None if Console().is_terminal else 180)
    if options.grid_study:
        from benchmarks.codec_grid_study import study

        study(distributions, every=QUICK_EVERY if quick else 2, console=console)
        return
    try:
        lines = run(distributions, every=QUICK_EVERY if quick else 1, rounds=3 if quick else 7)
    except ColdstillError as error:
        raise SystemExit(f"benchmark failed: {error}") from None
    print_tables(lines, console)
    teachers = {
        name: {"temperature": round(found.temperature, 4), "mean_entropy": round(found.entropy, 3)}
        for name, found in distributions.items()
    }
    positions = lines[0].side.case.positions
    facts = {"teachers": teachers, "text_sha256": distributions["flat"].text, "positions": positions}
    document = {**headline(lines), **facts, "lines": [figures(line) for line in lines]}
    finish("codec", document, command="python -m benchmarks.codec", quick=quick)


if __name__ == "__main__":
    main()
