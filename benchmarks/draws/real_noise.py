"""Noise and bytes of drawing rules on the distributions of a large model, one row in memory at a time.

Shape letters: `T` tokens, `N` positions of a row, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from benchmarks.draws.noise import NoiseSums, Row, rank_table
from benchmarks.draws.plan import Control, Rule

POSITIONS = 48
"""Of a row, its last ones: one float64 array `[48, 262144]` is 100 MB."""


def kind_of(name: str) -> str:
    """Whether the row of this name is a chat or a document."""
    return "chats" if name.startswith("chat-") else "Python"


@torch.inference_mode()
def rows_with_students(
    teacher: Any, students: dict[str, Any], rows: tuple[list[str], list[torch.Tensor]], *, positions: int
) -> list[tuple[str, dict[str, Row]]]:
    """Per row its kind, and for each student the row's last positions."""
    found = []
    for name, ids in zip(*rows, strict=True):
        at = slice(max(0, len(ids) - 1 - positions), len(ids) - 1)
        hidden = {of: _last_hidden(model, ids)[at] for of, model in (("", teacher), *students.items())}
        probs = _softmax(hidden.pop(""), teacher)
        found.append(
            (
                kind_of(name),
                {
                    of: Row(probs, _softmax(states, students[of]), states.double(), ids[at.start + 1 : at.stop + 1])
                    for of, states in hidden.items()
                },
            )
        )
    return found


def _last_hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = model.model(ids[None], use_cache=False).last_hidden_state[0]
    return states


def _softmax(hidden: torch.Tensor, model: Any) -> torch.Tensor:
    return (hidden @ model.lm_head.weight.T).double().softmax(-1)


def facts_of(probs: torch.Tensor) -> dict[str, float]:
    """Sums over positions of `probs [N, V]`: entropy in nats, and mass outside the top 4, 8 and 16."""
    best = probs.topk(16, 1).values.cumsum(1)
    mass = {f"outside_top_{k}": float((1 - best[:, k - 1]).sum()) for k in (4, 8, 16)}
    return {"positions": len(probs), "entropy": float(torch.special.entr(probs).sum()), **mass}


@torch.inference_mode()
def measure(
    teacher: Any,
    students: dict[str, Any],
    rows: tuple[list[str], list[torch.Tensor]],
    others: tuple[list[str], list[torch.Tensor]],
    *,
    rules: list[tuple[Rule, Control | None]],
    positions: int = POSITIONS,
) -> dict[str, Any]:
    """Facts of the distributions by kind of text, and the figures of `rules` by kind and student.

    `rows` are measured, one at a time because all of them would take gigabytes; `others` give the table of id ranks.
    """
    ranked = [
        (_last_hidden(teacher, ids)[-1 - positions : -1] @ teacher.lm_head.weight.T).topk(16, 1).indices.flatten()
        for ids in others[1]
    ]
    head = teacher.lm_head.weight
    settings: dict[str, Any] = {"vocabulary": len(head), "ranks": rank_table(ranked)}
    sums: dict[tuple[str, str, int], NoiseSums] = {}
    facts: dict[str, dict[str, float]] = {}
    for row in tqdm(list(zip(*rows, strict=True)), desc="rows"):
        for kind, of_students in rows_with_students(teacher, students, ([row[0]], [row[1]]), positions=positions):
            for number, (student, one) in enumerate(of_students.items()):
                if number == 0:
                    for name, value in facts_of(one.teacher).items():
                        of_kind = facts.setdefault(kind, {})
                        of_kind[name] = of_kind.get(name, 0) + value
                for place, (rule, control) in enumerate(rules):
                    key = (kind, student, place)
                    sums.setdefault(key, NoiseSums(rule, control, **settings)).add(
                        one, students[student].lm_head.weight
                    )
    lines = [
        {"text": kind, "student": student, **_named(*rules[place]), **of_rule.means()}
        for (kind, student, place), of_rule in sums.items()
    ]
    for of_kind in facts.values():
        means = {name: round(value / of_kind["positions"], 5) for name, value in of_kind.items() if name != "positions"}
        of_kind.update(means)
    return {"distributions": facts, "noise": lines}


def _named(rule: Rule, control: Control | None) -> dict[str, Any]:
    return {"rule": vars(rule), "control": None if control is None else vars(control)}


def choose_rows(
    rows: tuple[list[str], list[torch.Tensor], Any], *, start: int, of_kind: int
) -> tuple[list[str], list[torch.Tensor]]:
    """From place `start` on, the first `of_kind` rows of each kind with more than `POSITIONS` tokens."""
    taken: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, ids, _ in list(zip(*rows, strict=True))[start:]:
        of_this = taken.setdefault(kind_of(name), [])
        if len(ids) > POSITIONS and len(of_this) < of_kind:
            of_this.append((name, ids))
    chosen = [row for of_this in taken.values() for row in of_this]
    return [name for name, _ in chosen], [ids for _, ids in chosen]
