"""The benchmark of drawing rules: its rules are unbiased, its control is the loss's, and its log resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common.run_log import lines_of
from benchmarks.draws.grid import runs_of, shares_of
from benchmarks.draws.noise import load_scene
from benchmarks.draws.plan import DENSE, PLAIN, Control, Rule, controls, noise_jobs, rules
from benchmarks.draws.rules import Kept, keep, target
from coldstill.demo.settings import Layout
from coldstill.trainer.losses.taid import CONTROL_SHARE, LARGEST_CONTROL

REPEATS = 6000


def teacher_and_student(vocabulary: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, vocabulary, generator=generator, dtype=torch.float64).softmax(1)
    return both[0], both[1]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"{rule.name}-{rule.top_k}-{rule.draws}")
def test_the_mean_target_of_each_rule_is_the_teacher(rule: Rule) -> None:
    """Within five standard errors; where no draw is certain or weights are normalized, also their bias."""
    teacher, student = teacher_and_student()
    probs = teacher.expand(REPEATS, -1)
    kept = keep(probs, rule, torch.Generator().manual_seed(1))
    made = target(kept, student.expand(REPEATS, -1), probs)
    torch.testing.assert_close(made.sum(1), torch.ones(REPEATS, dtype=torch.float64))
    error = made.std(0) / REPEATS**0.5
    bias = 0.02 if rule.power != 1 else float((kept.weights.sum(1) == 0).double().mean())
    assert ((made.mean(0) - teacher).abs() <= 5 * error + bias + 1e-9).all()
    limit = min(rule.most, rule.draws)
    assert int((kept.weights > 0).sum(1).max()) <= limit


def test_systematic_draws_have_less_noise_than_independent_ones() -> None:
    teacher, student = teacher_and_student(200)
    probs = teacher.expand(500, -1)
    noise = []
    for changes in ({}, {"method": "systematic", "origin": "tail", "number": "rounded"}):
        rule = Rule(name="", top_k=4, draws=64, **changes)  # type: ignore[arg-type]
        made = target(keep(probs, rule, torch.Generator().manual_seed(1)), student.expand(500, -1), probs)
        noise.append(float((made - probs).square().sum()))
    assert noise[1] < 0.9 * noise[0]


def test_the_control_of_the_loss_is_among_those_that_are_measured() -> None:
    assert Control(CONTROL_SHARE, LARGEST_CONTROL) in controls()


def test_the_control_takes_its_share_off_each_draw_and_gives_it_to_the_students_tail() -> None:
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    student = torch.tensor([[0.4, 0.1, 0.1, 0.4]], dtype=torch.float64)
    kept = Kept(
        ids=torch.tensor([[0]]),
        logprobs=teacher[:, :1].log(),
        tail=torch.tensor([0.6], dtype=torch.float64),
        draws=torch.tensor([[1, 3]]),
        weights=torch.tensor([[0.5, 0.5]], dtype=torch.float64),
    )
    made = target(kept, student, teacher, Control(0.5, 3.0))
    # In the tail the teacher has 1/2, 1/3, 1/6 and the student 1/6, 1/6, 2/3: the ratios are 1/3, and 4, cut to 3.
    of_draws = [0.5 * (1 - 0.5 / 3), 0.5 * (1 - 0.5 * 3)]
    rest = 1 - sum(of_draws)
    wanted = [0.4, 0.6 * (rest / 6 + of_draws[0]), 0.6 * rest / 6, 0.6 * (rest * 2 / 3 + of_draws[1])]
    torch.testing.assert_close(made[0], torch.tensor(wanted, dtype=torch.float64))


def test_a_second_start_finds_the_finished_figures_and_shares(tmp_path: Path) -> None:
    log = tmp_path / "runs.jsonl"
    assert lines_of(log) == []
    jobs = list(noise_jobs(quick=False))
    runs = [
        {"teacher": "flat", "seed": seed, "side": side, "kl": kl}
        for seed, kls in enumerate(((1.0, 0.5, 0.6), (1.2, 0.2)))
        for side, kl in zip((PLAIN.name, DENSE.name, "other"), kls, strict=False)
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in [*({"noise": job} for job in jobs), *runs]))
    assert [line["noise"] for line in lines_of(log) if "noise" in line] == jobs
    assert shares_of(runs_of(log)) == {"flat": {PLAIN.name: [0, 0], DENSE.name: [1, 1], "other": [0.8]}}


def test_the_noise_is_not_measured_on_a_quick_demo(tmp_path: Path) -> None:
    """It has no rows that no run trains on, so nothing would be measured."""
    rows = Layout(tmp_path).rows("distill", "pairs")
    rows.parent.mkdir(parents=True)
    rows.write_text('{"prompt": "a", "response": "b"}\n' * 256)
    with pytest.raises(SystemExit, match=r"has 256 rows to distill on, and the noise needs 820: .* without --quick"):
        load_scene(tmp_path, tmp_path / "student", divisor=1.0, part="held_out", count=4)
