"""The rules, controls and sides of the benchmark of draws, and what a share is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.draws.rules import Control, Rule
from benchmarks.quality.plan import DENSE, PLAIN, TEACHERS
from benchmarks.quality.runs import Cache, Side

SEEDS = 3
TODAY = Rule(name="independent, at most 32 kept", top_k=16, most=32)
SIDES = [
    PLAIN,
    DENSE,
    Side("K=16, D=64, iid, kept 32", Cache(16, 64, 32, "iid")),
    *(
        Side(f"K={k}, D={d}, systematic, kept 64", Cache(k, d, 64, "systematic"))
        for k, d in ((4, 32), (4, 64), (8, 32), (8, 48), (8, 64), (16, 64))
    ),
    Side("K=8, D=32, systematic+lp, kept 64", Cache(8, 32, 64, "systematic", logprobs=True)),
    Side("K=8, D=64, systematic+lp, kept 64", Cache(8, 64, 64, "systematic", logprobs=True)),
]
"""Trained from captures; `lp`: with log-probs of the draws, for the control variate."""


def rules() -> list[Rule]:
    """The rules of part 1."""
    found = [TODAY]
    systematic: dict[str, Any] = {"method": "systematic", "origin": "tail", "number": "rounded"}
    for draws in (16, 32, 64):
        for top_k in (4, 8, 16):
            found.append(Rule(name="independent", top_k=top_k, draws=draws))
            found.append(Rule(name="systematic", top_k=top_k, draws=draws, **systematic))
            found.append(
                Rule(name="systematic by probability", top_k=top_k, draws=draws, order="probability", **systematic)
            )
        up = {**systematic, "number": "rounded_up"}
        found.append(Rule(name="systematic, rounded up", top_k=8, draws=draws, **up))
        found.append(Rule(name="systematic, floor 1/D", top_k=16, min_prob=1 / draws, draws=draws, **systematic))
        found.append(Rule(name="independent", top_k=0, draws=draws))
        found.append(Rule(name="systematic", top_k=0, draws=draws, method="systematic"))
        found.append(Rule(name="random sampling, power 0.8", top_k=0, draws=draws, power=0.8))
    found += [Rule(name="systematic, fixed", top_k=16, draws=d, method="systematic", origin="tail") for d in (4, 16)]
    return found


def controls() -> list[Control]:
    """The constants to choose from."""
    return [Control(share, limit) for share in (0.25, 0.5, 0.75, 1.0) for limit in (4.0, 50.0)]


def noise_jobs(quick: bool) -> Iterator[dict[str, Any]]:
    """The keys of part 1: teacher, student, part, rule and control."""
    for teacher in list(TEACHERS)[: 1 if quick else None]:
        for rule in [rules()[0], *rules()[4:6]] if quick else rules():
            yield {"teacher": teacher, "student": "before", "part": "held_out", "rule": vars(rule), "control": None}
        controlled = Rule(name="systematic", top_k=8, draws=64, method="systematic", origin="tail", number="rounded")
        for student in () if quick else ("before", "after"):
            for part in ("choose", "held_out"):
                for control in (None, *controls()):
                    named = None if control is None else vars(control)
                    facts = {"teacher": teacher, "student": student, "part": part}
                    yield {**facts, "rule": vars(controlled), "control": named}


def shares_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Teacher -> side -> share of dense TAID's gain over plain fine-tuning, for each seed that has all three."""
    kl = {(line["teacher"], line["side"], line["seed"]): line["kl"] for line in lines if "side" in line}
    found: dict[str, dict[str, list[float]]] = {}
    for (teacher, side, seed), value in sorted(kl.items(), key=lambda item: item[0][2]):
        plain, dense = kl.get((teacher, PLAIN.name, seed)), kl.get((teacher, DENSE.name, seed))
        if plain is not None and dense is not None:
            share = round((plain - value) / (plain - dense), 4)
            found.setdefault(teacher, {}).setdefault(side, []).append(share)
    return found
