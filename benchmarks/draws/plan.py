"""What is measured and trained: rules of drawing with their noise, and sides with their students."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

TEACHERS = {"as trained": 1.0, "sharpened": 0.512}
"""Divisor of the teacher's logits."""
Number = Literal["fixed", "rounded", "rounded_up"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is kept of a position: ids of the top `top_k` with at least `min_prob`, and draws outside of them.

    - `method`: independent draws, or equally spaced points of the cumulative sum with one random shift.
    - `origin`: what is drawn from. `softmax`: `draws` times, and draws of kept ids are dropped; `tail`: from the ids
      that are not kept.
    - `number`, from the tail: `fixed`, `draws` of them; `rounded`: `draws` times the tail's mass, rounded up or down at
      random, so that its mean is exact; `rounded_up`: always up.
    - `most`: the maximum number of draws that are kept.
    - `order`: of the ids along the cumulative sum: by token id, or by probability.
    - `power`: draws follow p to this power (arXiv 2503.16870), and their weights are p over what they follow,
      normalized.
    """

    name: str
    top_k: int
    min_prob: float = 1e-4
    method: Literal["iid", "systematic"] = "iid"
    origin: Literal["softmax", "tail"] = "softmax"
    number: Number = "fixed"
    draws: int = 64
    most: int = 1024
    order: Literal["id", "probability"] = "id"
    power: float = 1.0


@dataclass(frozen=True)
class Control:
    """The control variate of TAID's tail: `share` of the draws' noise is taken off, with ratios of at most `limit`."""

    share: float
    limit: float


@dataclass(frozen=True)
class Cache:
    """The part of the teacher that a cache keeps: `top_k` ids, and those of `draws` draws that fall into the tail.

    At most `kept_draws` of them are kept; None is the capture's default. `method`: how the draws are made. `logprobs`:
    with their log-probs, by which the loss takes off a part of their noise.
    """

    top_k: int
    draws: int
    kept_draws: int | None = 32
    method: Literal["iid", "systematic"] = "iid"
    logprobs: bool = False

    @property
    def tail(self) -> Literal["auto", "control_variate"]:
        """The loss's treatment of the tail."""
        return "control_variate" if self.logprobs else "auto"


@dataclass(frozen=True)
class Side:
    """One line of the table. A side without `cache` takes its targets from the labels or the dense teacher."""

    name: str
    cache: Cache | None = None
    renormalize: bool = False


PLAIN, DENSE_KL, DENSE = Side("plain fine-tuning"), Side("dense forward KL"), Side("dense TAID")


class Run(NamedTuple):
    """One training run: its teacher, order of rows and side."""

    teacher: str
    seed: int
    side: Side

    @property
    def key(self) -> tuple[str, int, str]:
        """As `grid.key_of` its line in the log."""
        return self.teacher, self.seed, self.side.name


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


def runs() -> list[Run]:
    """The training runs; the sides of one seed and teacher take turns."""
    return [Run(teacher, seed, side) for seed in range(SEEDS) for teacher in TEACHERS for side in SIDES]


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
