"""The divergences against dense references: exact for a dense cache, and for a truncated one the dense divergence from
the teacher whose tail has the student's shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from coldstill.trainer.loss_kernels.fused_head import Objective, SparseLoss, loss_on_logits
from coldstill.trainer.losses.divergences import JensenShannon, ReverseKl, SkewForwardKl, SkewReverseKl, TotalVariation
from coldstill.trainer.losses.taid import ForwardKl
from tests import reference
from tests.trainer.losses.scenes import cut, known, log_softmax, scene, value_and_gradient

Divergence = Callable[[np.ndarray, np.ndarray], float]
LOSSES: dict[str, tuple[Callable[..., SparseLoss], Divergence]] = {
    "reverse_kl": (ReverseKl, lambda p, q: reference.kl(q, p)),
    "js": (JensenShannon, lambda p, q: reference.js(p, q, 0.1)),
    "js of one half": (lambda **more: JensenShannon(beta=0.5, **more), lambda p, q: reference.js(p, q, 0.5)),
    "tvd": (TotalVariation, reference.tvd),
    "skew_forward_kl": (SkewForwardKl, lambda p, q: reference.skew_forward_kl(p, q, 0.1)),
    "skew_reverse_kl": (SkewReverseKl, lambda p, q: reference.skew_reverse_kl(p, q, 0.1)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tail", ["auto", "bucket"])
def test_equals_the_dense_divergence_where_the_cache_holds_the_whole_vocabulary(name, tail):
    student, teacher, _ = scene()
    loss, divergence = LOSSES[name]
    values, gradient = value_and_gradient(loss(tail=tail), student, cut(teacher, top_k=20))
    for m in range(6):
        p = np.exp(teacher[m])
        assert values.loss[m].item() == pytest.approx(divergence(p, reference.softmax(student[m])), abs=1e-12)
        wanted = reference.slope(lambda z, p=p: divergence(p, reference.softmax(z)), student[m])
        np.testing.assert_allclose(gradient[m], wanted, atol=2e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("pads", [0, 3])
def test_is_the_dense_divergence_from_the_teacher_whose_tail_has_the_student_s_shape(name, pads):
    student, teacher, draws = scene()
    loss, divergence = LOSSES[name]
    targets = cut(teacher, top_k=7, draws=draws, pads=pads)
    values, gradient = value_and_gradient(loss(), student, targets)
    for m in range(6):
        p = reference.student_shaped_teacher(student[m], *known(targets, m))
        assert values.loss[m].item() == pytest.approx(divergence(p, reference.softmax(student[m])), abs=1e-12)
        wanted = reference.slope(lambda z, p=p: divergence(p, reference.softmax(z)), student[m])
        np.testing.assert_allclose(gradient[m], wanted, atol=2e-9)


@pytest.mark.parametrize("pads", [0, 3])
def test_reverse_kl_with_forward_kl_in_the_tail_is_that_of_the_buckets_and_the_cross_entropy_of_the_draws(pads):
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws, pads=pads)
    values, gradient = value_and_gradient(ReverseKl(tail="forward_kl"), student, targets)
    of_buckets, bucket_gradient = value_and_gradient(ReverseKl(), student, targets)
    for m in range(6):
        outside = np.setdiff1d(np.arange(student.shape[1]), targets.ids[m].numpy())
        drawn = np.zeros(student.shape[1])
        np.add.at(drawn, targets.draws[m].numpy(), targets.draw_weights[m].double().numpy())
        mass = reference.softmax(student[m])[outside].sum()

        def within(z, outside=outside, drawn=drawn, mass=mass):
            return -mass * drawn[outside] @ np.log(reference.softmax(z[outside]))

        assert (values.loss[m] - of_buckets.loss[m]).item() == pytest.approx(within(student[m]), abs=1e-7)
        wanted = bucket_gradient[m] + reference.slope(within, student[m])
        np.testing.assert_allclose(gradient[m], wanted, atol=1e-7)


def test_the_draws_pull_a_student_back_whose_mass_is_on_one_id_of_the_tail():
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    m = int(targets.draw_weights.sum(1).argmax())
    alone = np.setdiff1d(np.arange(student.shape[1]), [*targets.ids[m].tolist(), *targets.draws[m].tolist()])[0]
    student[m, alone] += 100
    lost, pulled = (value_and_gradient(ReverseKl(tail=tail), student, targets)[1] for tail in ("bucket", "forward_kl"))
    assert np.abs(lost[m]).max() < 1e-20
    assert pulled[m][alone] == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("from_one_id", [False, True], ids=["random logits", "one id of the tail"])
def test_with_forward_kl_in_the_tail_free_logits_come_near_to_the_dense_reverse_kl(from_one_id):
    random, count, size, steps = np.random.default_rng(0), 32, 128, 300
    teacher = log_softmax(1.5 * random.standard_normal((count, size)))
    outside = [np.argsort(-row)[8:] for row in teacher]
    start = 3 * random.standard_normal((count, size))
    if from_one_id:
        start[np.arange(count), [rest[5] for rest in outside]] += 40

    def left(loss: SparseLoss) -> float:
        logits = torch.tensor(start, requires_grad=True)
        adam = torch.optim.Adam([logits], lr=0.2)
        for _ in range(steps):
            drawn = [random.choice(size, 64, p=np.exp(row)) for row in teacher]
            kept = [ids[np.isin(ids, rest)] for ids, rest in zip(drawn, outside, strict=True)]
            adam.zero_grad()
            loss_on_logits(logits, cut(teacher, top_k=8, draws=kept), Objective(loss), t=0)[0].backward()
            adam.step()
        log_q = logits.detach().log_softmax(1)
        return (log_q.exp() * (log_q - torch.tensor(teacher))).sum(1).mean().item()

    assert left(ReverseKl(tail="forward_kl")) < 0.2 * left(ReverseKl())


@pytest.mark.parametrize("name", LOSSES)
def test_is_a_lower_bound_of_the_dense_divergence(name):
    student, teacher, _ = scene()
    loss, divergence = LOSSES[name]
    values, _ = value_and_gradient(loss(), student, cut(teacher, top_k=7))
    for m in range(6):
        assert values.loss[m].item() < divergence(np.exp(teacher[m]), reference.softmax(student[m]))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "tvd"])
def test_gradcheck(name):
    student, teacher, draws = scene()
    targets = cut(teacher[:3], top_k=7, draws=draws[:3], pads=1)
    objective = Objective(LOSSES[name][0](), 0.25)
    leaf = torch.tensor(student[:3], requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss_on_logits(z, targets, objective, t=0.4)[0], (leaf,))


def test_gradcheck_of_tvd_away_from_its_kink():
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7)
    for m in range(6):
        p = reference.student_shaped_teacher(student[m], *known(targets, m))
        assert np.abs(p - reference.softmax(student[m])).min() > 1e-5
    leaf = torch.tensor(student, requires_grad=True)
    objective = Objective(TotalVariation())
    assert torch.autograd.gradcheck(lambda z: loss_on_logits(z, targets, objective, t=0.4)[0], (leaf,))


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_equal_to_the_teacher_has_nothing_to_learn(name):
    _, teacher, _ = scene()
    values, gradient = value_and_gradient(LOSSES[name][0](), teacher + 0.7, cut(teacher, top_k=7))
    np.testing.assert_allclose(values.loss, 0, atol=1e-12)
    if name != "tvd":
        np.testing.assert_allclose(gradient, 0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_neither_t_nor_the_draws_are_looked_at(name):
    student, teacher, draws = scene()
    loss = LOSSES[name][0]()
    values, gradient = value_and_gradient(loss, student, cut(teacher, top_k=7), 0.1)
    again, same = value_and_gradient(loss, student, cut(teacher, top_k=7, draws=draws), 1.0)
    np.testing.assert_array_equal(values.loss, again.loss)
    np.testing.assert_allclose(gradient, same, atol=1e-16)


def test_at_the_ends_of_alpha_the_skew_losses_are_the_plain_ones():
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7)
    for skew, plain in ((SkewForwardKl(alpha=0.0), ForwardKl()), (SkewReverseKl(alpha=0.0), ReverseKl())):
        for mine, theirs in zip(
            value_and_gradient(skew, student, targets), value_and_gradient(plain, student, targets), strict=True
        ):
            mine, theirs = (getattr(it, "loss", it) for it in (mine, theirs))
            np.testing.assert_allclose(mine, theirs, atol=1e-14)


def test_js_over_beta_tends_to_forward_kl():
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7)
    _, js = value_and_gradient(JensenShannon(beta=1e-7), student, targets)
    _, forward = value_and_gradient(ForwardKl(), student, targets)
    np.testing.assert_allclose(js / 1e-7, forward, atol=1e-4)
