"""The cases that the codec's benchmark measures, and the sides of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tqdm import tqdm

from benchmarks.codec.ours import Fidelity, our_sides, rival_side
from benchmarks.codec.peer import recommended_polynomials
from benchmarks.codec.rivals import BitPacked, NaiveLists, Rival
from benchmarks.codec.sides import Case, Measured, Side, measure
from benchmarks.inputs.small_language_model import VOCABULARY
from benchmarks.inputs.teacher_distributions import SHARPNESSES, Distributions
from benchmarks.inputs.teacher_rows import DRAWS, Limits, narrowed

TOP_KS = (16, 32, 50, 64, 128)
"""50 is there only for the smaller setting of the peer."""
FIDELITIES: tuple[Fidelity, ...] = ("fine", "coarse")
FLOOR = 1e-4
MOST_RANKS = 4096
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
