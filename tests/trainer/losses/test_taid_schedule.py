"""The laws of TAID's schedule."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from coldstill.trainer.arguments import RunLength
from coldstill.trainer.loss_kernels.fused_head import LossValues
from coldstill.trainer.losses.taid_schedule import TaidSchedule
from coldstill.trainer.step_record import StepRecord
from tests import reference


def course(schedule: TaidSchedule, losses: list[float]) -> list[float]:
    return [schedule.update(loss, step=step, total_steps=len(losses)) for step, loss in enumerate(losses, start=1)]


def noisy_losses(steps: int) -> list[float]:
    return (2 * np.exp(-np.arange(steps) / steps) + 0.05 * np.random.default_rng(0).standard_normal(steps)).tolist()


@pytest.mark.parametrize("steps", [10, 300, 12_000])
@pytest.mark.parametrize("alpha", [5e-4, 0.02])
def test_follows_the_official_rule(steps, alpha):
    losses = noisy_losses(steps)
    wanted = reference.taid_course(losses, t_start=0.4, t_end=1.0, alpha=alpha, beta=0.99, total_steps=steps)
    assert course(TaidSchedule(alpha=alpha), losses) == pytest.approx(wanted, abs=1e-12)


def test_the_first_call_only_remembers():
    schedule = TaidSchedule()
    assert schedule.update(3.0, step=1, total_steps=10) == 0.4
    assert (schedule.momentum, schedule.previous_loss) == (0.0, 3.0)


@pytest.mark.parametrize("kind", ["adaptive", "linear"])
@pytest.mark.parametrize("losses", [[1.0] * 50, [2.0**n for n in range(50)], [2.0**-n for n in range(50)], [0.0] * 50])
def test_never_falls_never_leaves_its_bounds_and_arrives(kind, losses):
    values = [0.2, *course(TaidSchedule(kind=kind, t_start=0.2, t_end=0.9), losses)]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert values[-1] == pytest.approx(0.9)
    assert max(values) <= 0.9


@pytest.mark.parametrize("steps", [100, 4000])
def test_at_the_paper_s_alpha_a_run_of_up_to_4000_steps_is_the_linear_one(steps):
    losses = noisy_losses(steps)
    adaptive, linear = course(TaidSchedule(alpha=5e-4), losses), course(TaidSchedule(kind="linear"), losses)
    assert adaptive[1:] == pytest.approx(linear[1:], abs=1e-3)


def test_automatic_alpha_gives_every_length_the_paper_s_curve():
    short, long = course(TaidSchedule(), [1.0] * 200), course(TaidSchedule(alpha=5e-4), [1.0] * 11_600)
    assert short[99] == pytest.approx(long[5799], abs=0.01)
    assert short[99] - 0.7 > 0.1


def test_automatic_alpha_does_not_leap_in_a_handful_of_steps():
    assert max(np.diff(course(TaidSchedule(), [1.0] * 6))) < 0.25


def test_a_first_loss_of_zero_does_not_silence_the_rule():
    schedule = TaidSchedule(t_start=0.0)
    course(schedule, [0.0, *[1.0] * 99])
    assert abs(schedule.momentum) < 0.1


def test_the_linear_schedule_does_not_listen_to_the_loss():
    assert course(TaidSchedule(kind="linear"), [1.0] * 20) == course(TaidSchedule(kind="linear"), noisy_losses(20))


def test_resumes_from_a_state_that_was_stored_as_json():
    losses = noisy_losses(200)
    unbroken, first, second = TaidSchedule(), TaidSchedule(), TaidSchedule()
    wanted = course(unbroken, losses)
    for step in range(1, 101):
        first.update(losses[step - 1], step=step, total_steps=200)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got = [second.update(losses[step - 1], step=step, total_steps=200) for step in range(101, 201)]
    assert got == wanted[100:]
    assert second.state_dict() == unbroken.state_dict()


def test_a_step_whose_rows_were_all_skipped_has_no_loss_that_t_or_the_log_follows():
    def run(*losses: float | None) -> tuple[dict[str, Any], dict[str, float]]:
        length = RunLength.of(TrainingArguments("o", max_steps=100, use_cpu=True), batches_per_epoch=100)
        record = StepRecord(TaidSchedule(), None, order={}, length=length)
        state = SimpleNamespace(global_step=0, max_steps=100, epoch=0.0)
        for loss in losses:
            values = torch.full((0 if loss is None else 3,), loss or 0.0)
            record.open_step(targets=len(values), cursor=None)
            record.add(
                LossValues(loss=values, distillation=values, bucket_kl=values), {"sample_ids": [], "target_samples": []}
            )
            record.on_pre_optimizer_step(None, state, None)
            state.global_step += 1
            record.on_step_end(None, state, None)
        return record.schedule.state_dict(), record.take_logs()

    (schedule, logs), (wanted, of_full_steps) = run(2.0, None, 1.5, None), run(2.0, 1.5)
    assert {**schedule, "t": 0} == {**wanted, "t": 0}
    assert schedule["t"] > 0.4 + 0.6 * 4 / 100  # the line
    assert logs["bucket_kl"] == of_full_steps["bucket_kl"]
