"""The corrected mass of the tail: exact if the ratio of the shapes is known, and one step behind otherwise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from coldstill.trainer.loss_kernels.fused_head import Head, Objective, loss_on_hidden, loss_on_logits
from coldstill.trainer.losses.base import state_of
from coldstill.trainer.losses.taid import MassCorrectedTaid, Taid, TailRatio
from tests import reference
from tests.trainer.losses.scenes import TIMES, cut, known, log_softmax, outcomes, scene, value_and_gradient


def ratio_of(value: float) -> MassCorrectedTaid:
    loss = MassCorrectedTaid()
    loss.state.value = value
    return loss


def shapes(student: np.ndarray, teacher: np.ndarray, tail: list[int]) -> tuple[np.ndarray, np.ndarray]:
    q, p = reference.softmax(student)[tail], np.exp(teacher)[tail]
    return q / q.sum(), p / p.sum()


@pytest.mark.parametrize("t", TIMES)
def test_the_tail_has_the_mass_of_dense_taid_where_the_draws_are_the_whole_tail(t):
    # Half as sharp as elsewhere: no draw reaches the largest ratio.
    student, teacher = scene().student / 2, log_softmax(scene().teacher / 2)
    for m in range(6):
        tail = np.argsort(-teacher[m])[7:].tolist()
        of_student, of_teacher = shapes(student[m], teacher[m], tail)
        exact = float((of_teacher * (of_student / of_teacher) ** (1 - t)).sum())
        targets = cut(teacher[m : m + 1], top_k=7, draws=[tail], weights=[of_teacher.tolist()])
        _, gradient = value_and_gradient(ratio_of(exact), student[m : m + 1], targets, t)
        target = reference.softmax(student[m]) - gradient[0]
        dense = reference.dense_taid_target(student[m], teacher[m], t)
        kept = targets.ids[0].tolist()
        np.testing.assert_allclose(target[kept], dense[kept], atol=1e-12)
        assert target[tail].sum() == pytest.approx(dense[tail].sum(), abs=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_few_draws_are_shrunk_to_the_prior_by_8(t):
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    _, gradient = value_and_gradient(ratio_of(0.7), student, targets, t)
    for m in range(6):
        facts = known(targets, m)
        tail = [v for v in range(20) if v not in facts.ids]
        of_student, of_teacher = (dict(zip(tail, it, strict=True)) for it in shapes(student[m], teacher[m], tail))
        ratios = [min((of_student[v] / of_teacher[v]) ** (1 - t), 50) for v in draws[m]]
        ratio = (sum(ratios) + 8 * 0.7) / (len(ratios) + 8)
        target = reference.sparse_target(student[m], *facts, draws[m], t, tail_ratio=ratio)
        np.testing.assert_allclose(gradient[m], reference.gradient(student[m], target), atol=1e-12)


def test_at_t_1_it_is_the_mixture():
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    for mine, theirs in zip(
        value_and_gradient(MassCorrectedTaid(), student, targets, 1.0),
        value_and_gradient(Taid(), student, targets, 1.0),
        strict=True,
    ):
        mine, theirs = (getattr(it, "loss", it) for it in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, atol=1e-13)


@pytest.mark.parametrize("t", TIMES)
def test_a_student_equal_to_the_teacher_has_no_expected_gradient(t):
    teacher = log_softmax(np.random.default_rng(12).standard_normal((1, 6)))[0]
    every = outcomes(MassCorrectedTaid(), teacher + 0.7, teacher, top_k=2, count=3, t=t)
    np.testing.assert_allclose(every.chances @ every.targets, np.exp(teacher), atol=1e-12)


def test_the_ratio_brings_the_tail_nearer_to_the_dense_one_and_nearer_still_once_there_is_a_prior():
    random = np.random.default_rng(6)
    teacher, student = log_softmax(2 * random.standard_normal((40, 60))), 2 * random.standard_normal((40, 60))
    outside = [np.argsort(-row)[7:] for row in teacher]
    draws = [random.choice(o, 5, p=np.exp(r[o]) / np.exp(r[o]).sum()) for o, r in zip(outside, teacher, strict=True)]
    targets, loss = cut(teacher, top_k=7, draws=[some.tolist() for some in draws]), MassCorrectedTaid()
    off = []
    for _ in range(2):
        _, gradient = value_and_gradient(loss, student, targets, 0.4)
        loss.state.update(loss.state.take().tolist(), step=1, total_steps=2)
        off.append(tail_mass_error(student, teacher, gradient, outside))
    assert loss.state.value < 1
    _, plain = value_and_gradient(Taid(), student, targets, 0.4)
    assert off[1] < off[0] < tail_mass_error(student, teacher, plain, outside)


def tail_mass_error(student: np.ndarray, teacher: np.ndarray, gradient: np.ndarray, outside: list[np.ndarray]) -> float:
    errors = []
    for m, tail in enumerate(outside):
        dense = reference.dense_taid_target(student[m], teacher[m], 0.4)
        errors.append(abs((reference.softmax(student[m]) - gradient[m])[tail].sum() - dense[tail].sum()))
    return float(np.mean(errors))


def test_the_prior_is_that_of_the_step_before_however_the_step_is_cut():
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    results = []
    for chunk_rows in (1, 2, 6):
        objective = Objective(MassCorrectedTaid())
        state = state_of(objective)
        assert state is not None
        values = []
        for _ in range(2):
            hidden = torch.tensor(student, requires_grad=True)
            head = Head(weight=torch.eye(20, dtype=torch.float64), bias=None, token_count=20)
            _, found = loss_on_hidden(hidden, head, targets, objective, t=0.4, chunk_bytes=chunk_rows * 20 * 8)
            values.append(found.loss)
            state.update(state.take().tolist(), step=1, total_steps=2)
        results.append((torch.stack(values), state.state_dict()["tail_ratio"]))
    for values, ratio in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=0, atol=1e-13)
        assert ratio == pytest.approx(results[0][1], rel=1e-13)
    assert results[0][1] != 1.0


def test_the_mean_is_over_draws_and_a_step_without_any_changes_nothing():
    student, teacher, draws = scene()
    loss = MassCorrectedTaid()
    value_and_gradient(loss, student, cut(teacher, top_k=7, draws=draws), 0.4)
    _, count = loss.state.take().tolist()
    assert count == pytest.approx(sum(len(some) for some in draws))
    loss.state.update([4.5, 5.0], step=1, total_steps=2)
    assert loss.state.value == 0.9
    value_and_gradient(loss, student, cut(teacher, top_k=7), 0.4)
    loss.state.update(loss.state.take().tolist(), step=2, total_steps=2)
    assert loss.state.value == 0.9


def test_evaluation_leaves_the_state_alone():
    student, teacher, draws = scene()
    objective = Objective(MassCorrectedTaid())
    targets = cut(teacher, top_k=7, draws=draws)
    loss_on_logits(torch.tensor(student), targets, objective, t=0.4)
    with torch.no_grad():
        loss_on_logits(torch.tensor(student, requires_grad=True), targets, objective, t=0.4)
    state = state_of(objective)
    assert state is not None
    assert state.take().tolist() == [0.0, 0.0]
    state.update([0.0, 0.0], step=1, total_steps=1)
    assert state.state_dict() == state.initial_state()


def test_training_moves_the_state():
    student, teacher, draws = scene()
    objective = Objective(MassCorrectedTaid())
    loss_on_logits(torch.tensor(student, requires_grad=True), cut(teacher, top_k=7, draws=draws), objective, t=0.4)
    state = state_of(objective)
    assert state is not None
    state.update(state.take().tolist(), step=1, total_steps=1)
    assert state.state_dict() != state.initial_state()


def test_a_draw_that_the_teacher_finds_unlikely_does_not_rule_the_estimate():
    teacher = log_softmax(np.array([[5.0, 0.0, -30.0]]))
    targets = cut(teacher, top_k=1, draws=[[2]])
    loss = MassCorrectedTaid()
    value_and_gradient(loss, np.array([[0.0, 0.0, 20.0]]), targets, 0.4)
    assert loss.state.take().tolist() == pytest.approx([50.0, 1.0])


def test_resumes_from_a_state_that_was_stored_as_json():
    first, second = TailRatio(), TailRatio()
    first.update([3.0, 4.0], step=5, total_steps=10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.value == first.value == 0.75
    assert first.logs() == {"taid_tail_ratio": 0.75}


def test_a_reset_state_is_a_new_one():
    ratio = TailRatio()
    ratio.update([3.0, 4.0], step=5, total_steps=10)
    ratio.add(torch.tensor(3.0), torch.tensor(4.0))
    ratio.reset()
    assert ratio.value == TailRatio().value == 1.0
    assert ratio.take().tolist() == [0.0, 0.0]
