"""Curriculum temperature: the loss at T, and a T that really is trained, against the student."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from coldstill.trainer.losses import Objective, memory_of
from coldstill.trainer.losses.ctkd import Ctkd, CurriculumTemperature
from coldstill.trainer.losses.on_logits import loss_on_logits
from tests import reference
from tests.trainer.losses.scenes import cut, scene, value_and_gradient


def at_temperature(temperature: float) -> Ctkd:
    loss = Ctkd()
    loss.memory.theta = -float(np.log(20 / (temperature - 1) - 1))
    assert loss.memory.value == pytest.approx(temperature)
    return loss


@pytest.mark.parametrize("temperature", [1.5, 4.0, 15.62])
def test_is_forward_kl_of_both_at_the_temperature_times_its_square(temperature):
    student, teacher, _ = scene()
    values, gradient = value_and_gradient(at_temperature(temperature), student, cut(teacher, top_k=20, pads=1))
    for m in range(6):
        p = np.exp(teacher[m])

        def dense(z: np.ndarray, p: np.ndarray = p) -> float:
            return reference.kl_at_temperature(p, reference.softmax(z), temperature)

        assert values.loss[m].item() == pytest.approx(dense(student[m]), abs=1e-11)
        np.testing.assert_allclose(gradient[m], reference.slope(dense, student[m]), atol=5e-8)


def test_gradcheck():
    student, teacher, _ = scene()
    targets, objective = cut(teacher, top_k=20), Objective(Ctkd())
    leaf = torch.tensor(student, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss_on_logits(z, targets, objective, t=0.4)[0], (leaf,))


def test_begins_at_the_authors_temperature():
    assert CurriculumTemperature().value == pytest.approx(1 + 20 / (1 + np.exp(-1.0)))
    assert CurriculumTemperature().value == pytest.approx(15.62, abs=0.01)


@pytest.mark.parametrize("temperature", [2.0, 15.62])
def test_the_memory_adds_up_the_slope_of_the_loss_by_the_temperature(temperature):
    student, teacher, _ = scene()
    loss = at_temperature(temperature)
    value_and_gradient(loss, student, cut(teacher, top_k=20))
    slope, positions = loss.memory.take().tolist()
    assert positions == 6

    def whole(temperature: float) -> float:
        return sum(
            reference.kl_at_temperature(np.exp(p), reference.softmax(z), temperature)
            for p, z in zip(teacher, student, strict=True)
        )

    assert slope == pytest.approx((whole(temperature + 1e-4) - whole(temperature - 1e-4)) / 2e-4, rel=1e-6)


@pytest.mark.parametrize("slope", [0.5, -0.5])
def test_the_temperature_climbs_the_loss(slope):
    temperature = CurriculumTemperature()
    before = temperature.value
    temperature.update([6 * slope, 6.0], step=1000, total_steps=1000)
    assert (temperature.value - before) * slope > 0
    risen = 1 / (1 + np.exp(-1.0))
    assert temperature.theta == pytest.approx(1 + 0.1 * slope * 20 * risen * (1 - risen))


def test_the_curriculum_begins_with_no_strength_and_has_all_of_it_after_a_24th_of_the_run():
    moves = []
    for step in (1, 50, 100, 2400):
        temperature = CurriculumTemperature()
        temperature.update([1.0, 1.0], step=step, total_steps=2400)
        moves.append(temperature.theta - 1.0)
    assert moves[0] < 1e-3 * moves[2]
    assert moves[1] == pytest.approx(moves[2] / 2)
    assert moves[2] == pytest.approx(moves[3])


def test_training_moves_the_temperature_and_evaluation_does_not():
    student, teacher, _ = scene()
    targets, objective = cut(teacher, top_k=20), Objective(Ctkd())
    memory = memory_of(objective)
    assert memory is not None
    loss_on_logits(torch.tensor(student), targets, objective, t=1.0)
    with torch.no_grad():
        loss_on_logits(torch.tensor(student, requires_grad=True), targets, objective, t=1.0)
    assert memory.take().tolist() == [0.0, 0.0]
    memory.update([0.0, 0.0], step=10, total_steps=10)
    assert memory.state_dict() == memory.initial_state()
    loss_on_logits(torch.tensor(student, requires_grad=True), targets, objective, t=1.0)
    memory.update(memory.take().tolist(), step=10, total_steps=10)
    assert memory.state_dict() != memory.initial_state()


def test_goes_on_from_a_state_that_went_through_json():
    first, second = CurriculumTemperature(), CurriculumTemperature()
    first.update([3.0, 2.0], step=5, total_steps=10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.value == first.value
    assert first.logs() == {"ctkd_temperature": first.value}
    first.reset()
    assert first.value == CurriculumTemperature().value
