"""Noise and bytes of drawing rules on a real language model's distributions, Gemma 3 270M with V = 262,144.

    python -m benchmarks.draws_real [--student FOLDER]      QUICK=1: one row and three rules; nothing is stored

The figures of part 1 of `benchmarks.draws`: squared error of forward KL's gradient against the dense one, and bytes,
for the last positions of rows of chats and of Python text that `inputs/real_text.py` keeps for the test. Students have
eight of the teacher's layers: untrained, and, with `--student`, a trained one. Their head is the teacher's.

Shape letters: `T` tokens, `N` positions of a row, `V` vocabulary, `H` width.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.report import finish
from benchmarks.common.whole_teacher import rows_of_text
from benchmarks.draws.noise import NoiseSums, Row, rank_table
from benchmarks.draws.plan import TODAY
from benchmarks.draws.rules import Control, Rule
from benchmarks.inputs import real_text
from benchmarks.inputs.cut_models import load_model, write_student
from benchmarks.inputs.real_model import model_folder
from coldstill.trainer.losses.taid import CONTROL_SHARE, LARGEST_CONTROL

LAYERS = 8
ROWS_OF_KIND, QUICK_ROWS_OF_KIND = 3, 1
POSITIONS = 48
"""Of a row, its last ones: one float64 array `[48, 262144]` is 100 MB."""
RANK_ROWS = 12
MAX_LENGTH = 256
SYSTEMATIC: dict[str, Any] = {"method": "systematic", "origin": "tail", "number": "rounded"}
RULES: list[tuple[Rule, Control | None]] = [
    (TODAY, None),
    *((Rule(name="independent", top_k=k), None) for k in (8, 16)),
    *((Rule(name="systematic", top_k=k, **SYSTEMATIC), None) for k in (4, 8, 16)),
    (Rule(name="systematic by probability", top_k=8, order="probability", **SYSTEMATIC), None),
    (Rule(name="systematic", top_k=8, draws=32, **SYSTEMATIC), None),
    (Rule(name="systematic", top_k=4, draws=32, **SYSTEMATIC), None),
    (Rule(name="systematic", top_k=0, method="systematic"), None),
    (Rule(name="random sampling, power 0.8", top_k=0, power=0.8), None),
    (Rule(name="systematic", top_k=8, **SYSTEMATIC), Control(CONTROL_SHARE, LARGEST_CONTROL)),
]
QUICK_RULES = [RULES[0], RULES[4], RULES[-1]]


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


def main() -> None:
    """Measure the rules on the real model, and store a full run."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, help="folder of a trained student, measured beside the untrained one")
    parser.add_argument("--state", default="trained", help="what the trained student is called in the result")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    torch.set_num_threads(1)
    folder = model_folder()

    teacher = load_model(folder)
    with tempfile.TemporaryDirectory() as scratch:
        write_student(folder, Path(scratch) / "student", layers=LAYERS)
        students = {"untrained": load_model(Path(scratch) / "student")}
        parts = real_text.write_rows(Path(scratch) / "rows", {"train": 0, "validation": 60, "test": 60})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tested = rows_of_text(parts["test"], tokenizer, max_length=MAX_LENGTH)
        ranking = rows_of_text(parts["validation"], tokenizer, max_length=MAX_LENGTH)
    if options.student:
        students[options.state] = load_model(options.student)
    figures = measure(
        teacher,
        students,
        choose_rows(tested, start=0, of_kind=QUICK_ROWS_OF_KIND if quick else ROWS_OF_KIND),
        choose_rows(ranking, start=0, of_kind=1 if quick else RANK_ROWS // 2),
        rules=QUICK_RULES if quick else RULES,
    )
    _show(figures)
    facts = {"teacher": "Gemma 3 270M", "vocabulary": len(teacher.lm_head.weight), "layers_of_students": LAYERS}
    finish("draws_real", {**facts, **figures}, command="make bench-draws-real", quick=quick)


def _show(figures: dict[str, Any]) -> None:
    for kind, facts in figures["distributions"].items():
        table = Table(
            "student", "K", "D", "rule", "bytes", "logits", "hidden", "head", title=f"noise x 1000, {kind}: {facts}"
        )
        for line in figures["noise"]:
            if line["text"] == kind:
                rule = line["rule"]
                noise = (f"{1000 * line[name]:.2f}" for name in ("logits", "hidden", "head"))
                name = rule["name"] + (", control variate" if line["control"] else "")
                table.add_row(
                    line["student"], str(rule["top_k"]), str(rule["draws"]), name, f"{line['bytes']:.1f}", *noise
                )
        Console().print(table)


if __name__ == "__main__":
    main()
