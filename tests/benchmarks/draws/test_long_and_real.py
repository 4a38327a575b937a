"""Draws at more targets, and on a real model's distributions: what is stored, and the figures on a toy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.draws.grid import key_of
from benchmarks.draws.long import SIDES, planned, report
from benchmarks.draws.plan import DENSE, PLAIN
from benchmarks.draws.real import RULES
from benchmarks.draws.real_noise import choose_rows, facts_of, measure
from benchmarks.inputs.cut_models import toy_model


def test_a_share_needs_both_ends_of_its_teacher_and_order_of_rows() -> None:
    def line(seed: int, side: str, kl: float) -> dict[str, Any]:
        return {"teacher": "as trained", "seed": seed, "side": side, "kl": kl}

    default = SIDES[2].name
    lines = [line(0, PLAIN.name, 1.0), line(0, DENSE.name, 0.5), line(0, default, 0.6), line(1, default, 0.1)]
    found = report(lines, quick=False)
    assert found["runs_planned"] == len(list(planned(quick=False)))
    assert found["runs_done"] == len({key_of(each) for each in lines})
    assert found["share_of_dense_gain"]["as trained"][default] == [pytest.approx(0.8)]


def test_rows_are_taken_by_kind_and_short_ones_are_left_out() -> None:
    long, short = torch.arange(80), torch.arange(20)
    names = ["chat-1", "chat-2", "m.py:0", "chat-3", "m.py:1"]
    rows = (names, [long, short, long, long, long], [torch.arange(9)] * 5)
    assert choose_rows(rows, start=0, of_kind=2)[0] == ["chat-1", "chat-3", "m.py:0", "m.py:1"]
    assert choose_rows(rows, start=1, of_kind=1)[0] == ["chat-3", "m.py:0"]


def test_facts_are_sums_of_the_entropy_and_of_the_mass_outside_the_most_probable_ids() -> None:
    probs = torch.full((3, 32), 1 / 32, dtype=torch.float64)
    found = facts_of(probs)
    assert found["positions"] == 3
    assert found["entropy"] == pytest.approx(3 * torch.tensor(32.0).log().item())
    assert found["outside_top_8"] == pytest.approx(3 * 24 / 32)


def test_more_draws_leave_less_noise_on_a_toy_and_every_rule_has_figures(tmp_path: Path) -> None:
    teacher, student = toy_model(97).eval(), toy_model(97).eval()
    with torch.no_grad():
        for number, weight in enumerate(teacher.parameters()):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    ids = [torch.arange(60) * step % 97 for step in (1, 3)]
    found = measure(
        teacher, {"untrained": student}, (["chat-1", "m.py:0"], ids), (["m.py:1"], ids[:1]), rules=RULES, positions=24
    )
    assert {line["text"] for line in found["noise"]} == {"chats", "Python"}
    assert len(found["noise"]) == 2 * len(RULES)
    of = {
        (line["rule"]["top_k"], line["rule"]["draws"]): line["hidden"]
        for line in found["noise"]
        if line["rule"]["name"] == "systematic" and line["control"] is None
    }
    assert of[8, 64] < of[8, 32]
