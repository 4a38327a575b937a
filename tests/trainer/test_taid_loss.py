"""The sparse TAID loss, forward KL and cross-entropy against slow float64 twins, and the laws they must obey."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests import reference
from trainer.config import LossConfig
from trainer.errors import NoDraws
from trainer.losses import build_loss, build_schedule
from trainer.losses.cross_entropy import cross_entropy_loss
from trainer.losses.forward_kl import forward_kl_loss
from trainer.losses.taid import taid_loss
from trainer.targets import SparseTargets

TIMES = (0.0, 0.1, 0.4, 0.7, 1.0)


def make_targets(teacher: np.ndarray, *, top_k: int, draws: Sequence[Sequence[int]], pads: int = 0) -> SparseTargets:
    """Float64 targets of dense teacher log-probs `[M, V]`, by the plainest code; `pads` unused entries at the end."""
    ids = np.argsort(-teacher, axis=1)[:, :top_k]
    kept = np.take_along_axis(teacher, ids, 1)
    tails = [np.delete(teacher[m], ids[m]) for m in range(len(teacher))]
    ids = np.concatenate([ids, np.repeat(ids[:, :1], pads, 1)], 1)
    kept = np.concatenate([kept, np.full((len(teacher), pads), -np.inf)], 1)
    width = max((len(drawn) for drawn in draws), default=0)
    return SparseTargets(
        ids=torch.from_numpy(ids),
        logprobs=torch.from_numpy(kept),
        log_tail=torch.from_numpy(np.array([math.log(np.exp(tail).sum()) if tail.size else -60.0 for tail in tails])),
        labels=torch.arange(len(teacher)) % teacher.shape[1],
        label_logprob=torch.zeros(len(teacher)),
        draws=torch.tensor([[*drawn, *[0] * (width - len(drawn))] for drawn in draws], dtype=torch.int64),
        draw_counts=torch.tensor([len(drawn) for drawn in draws]),
        row=torch.zeros(len(teacher), dtype=torch.int64),
        position=torch.arange(len(teacher)),
    )


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return np.log(np.stack([reference.softmax(row) for row in scores]))


def value_and_gradient(loss, logits: np.ndarray, targets: SparseTargets, t: float, **more) -> tuple:
    leaf = torch.tensor(logits, requires_grad=True)
    values = loss(leaf, targets, t=t, **more)
    values.loss.sum().backward()
    return values, leaf.grad.numpy()


@pytest.fixture
def scene() -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Student logits and teacher log-probs `[6, 20]`, and tail draws outside the top 7: none, one, many, repeats."""
    rng = np.random.default_rng(3)
    teacher = log_softmax(2 * rng.standard_normal((6, 20)))
    outside = [np.argsort(-row)[7:] for row in teacher]
    draws = [[], [3], [0, 0, 5], [1, 2, 3, 4], [6, 6, 6, 6, 6], []]
    return (
        2 * rng.standard_normal((6, 20)),
        teacher,
        [[int(o[i]) for i in d] for o, d in zip(outside, draws, strict=True)],
    )


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("tail", ["bucket", "mixture"])
def test_equals_dense_taid_where_the_cache_holds_the_whole_vocabulary(scene, t, tail):
    student, teacher, _ = scene
    targets = make_targets(teacher, top_k=20, draws=[[]] * 6)
    values, gradient = value_and_gradient(taid_loss, student, targets, t, tail=tail)
    for m in range(6):
        target = reference.dense_taid_target(student[m], teacher[m], t)
        assert values.loss[m].item() == pytest.approx(reference.kl(target, reference.softmax(student[m])), abs=1e-12)
        np.testing.assert_allclose(gradient[m], reference.gradient(student[m], target), atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("tail", ["bucket", "mixture"])
@pytest.mark.parametrize("pads", [0, 3])
def test_equals_the_explicit_sparse_target_with_draws_repeats_and_pads(scene, t, tail, pads):
    student, teacher, draws = scene
    targets = make_targets(teacher, top_k=7, draws=draws, pads=pads)
    values, gradient = value_and_gradient(taid_loss, student, targets, t, tail=tail)
    for m in range(6):
        ids, logprobs = targets.ids[m, :7].tolist(), targets.logprobs[m, :7].tolist()
        known = (ids, logprobs, targets.log_tail[m].item(), draws[m] if tail == "mixture" else [])
        target = reference.sparse_target(student[m], *known, t)
        assert target.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(gradient[m], reference.gradient(student[m], target), atol=1e-12)
        assert values.loss[m].item() == pytest.approx(reference.sparse_value(student[m], *known, t), abs=1e-12)
        assert values.bucket_kl[m].item() == pytest.approx(reference.bucket_kl(student[m], *known[:3]), abs=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_gradient_is_the_slope_of_the_value_with_the_target_fixed(scene, t):
    student, teacher, draws = scene
    targets = make_targets(teacher, top_k=7, draws=draws)
    _, gradient = value_and_gradient(taid_loss, student, targets, t)
    step = 1e-5
    for m in range(6):
        known = (targets.ids[m].tolist(), targets.logprobs[m].tolist(), targets.log_tail[m].item(), draws[m], t)
        for v in range(20):
            up, down = student[m].copy(), student[m].copy()
            up[v] += step
            down[v] -= step
            rise = reference.sparse_value(up, *known, fixed_at=student[m])
            slope = (rise - reference.sparse_value(down, *known, fixed_at=student[m])) / (2 * step)
            assert gradient[m, v] == pytest.approx(slope, abs=1e-8)


def test_expected_target_at_t_1_is_the_teacher_given_that_there_is_a_draw():
    rng = np.random.default_rng(11)
    teacher, student = log_softmax(rng.standard_normal((1, 6))), rng.standard_normal((1, 6))
    ids = make_targets(teacher, top_k=2, draws=[[]]).ids[0].tolist()
    expected, probability = np.zeros(6), 0.0
    for chance, drawn in reference.all_draws(np.exp(teacher[0]), ids, 3):
        if not drawn:
            continue
        _, gradient = value_and_gradient(taid_loss, student, make_targets(teacher, top_k=2, draws=[drawn]), 1.0)
        expected += chance * (reference.softmax(student[0]) - gradient[0])
        probability += chance
    np.testing.assert_allclose(expected / probability, np.exp(teacher[0]), atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_a_student_equal_to_the_teacher_has_no_expected_gradient(t):
    rng = np.random.default_rng(12)
    teacher = log_softmax(rng.standard_normal((1, 6)))
    ids = make_targets(teacher, top_k=2, draws=[[]]).ids[0].tolist()
    expected = np.zeros(6)
    for chance, drawn in reference.all_draws(np.exp(teacher[0]), ids, 3):
        targets = make_targets(teacher, top_k=2, draws=[drawn])
        expected += chance * value_and_gradient(taid_loss, teacher + 0.7, targets, t)[1][0]
    np.testing.assert_allclose(expected, 0, atol=1e-12)
    values, gradient = value_and_gradient(
        taid_loss, teacher, make_targets(teacher, top_k=2, draws=[[]]), t, tail="bucket"
    )
    assert values.loss.item() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_at_t_0_the_target_is_the_student_itself(scene):
    student, teacher, draws = scene
    values, gradient = value_and_gradient(taid_loss, student, make_targets(teacher, top_k=7, draws=draws), 0.0)
    np.testing.assert_allclose(gradient, 0, atol=1e-15)
    np.testing.assert_allclose(values.loss.detach(), 0, atol=1e-12)


def test_is_not_the_probability_mix_which_is_forward_kl_times_t(scene):
    student, teacher, _ = scene
    targets = make_targets(teacher, top_k=20, draws=[[]] * 6)
    _, taid = value_and_gradient(taid_loss, student, targets, 0.4)
    _, forward = value_and_gradient(forward_kl_loss, student, targets, 0.4)
    mix = [
        reference.gradient(z, reference.probability_mix_target(z, p, 0.4))
        for z, p in zip(student, teacher, strict=True)
    ]
    np.testing.assert_allclose(mix, 0.4 * forward, atol=1e-12)
    assert np.abs(taid - mix).max() > 0.05


def test_forward_kl_is_taid_at_t_1_whatever_t_is_given(scene):
    student, teacher, draws = scene
    targets = make_targets(teacher, top_k=7, draws=draws)
    forward, forward_gradient = value_and_gradient(forward_kl_loss, student, targets, 0.3)
    taid, gradient = value_and_gradient(taid_loss, student, targets, 1.0)
    np.testing.assert_array_equal(forward.loss.detach(), taid.loss.detach())
    np.testing.assert_array_equal(forward_gradient, gradient)


def test_cross_entropy_reads_labels_alone_and_measures_the_same_bucket_kl(scene):
    student, teacher, draws = scene
    targets = make_targets(teacher, top_k=7, draws=draws)
    values, gradient = value_and_gradient(cross_entropy_loss, student, targets, 0.0)
    for m in range(6):
        label = int(targets.labels[m])
        assert values.loss[m].item() == pytest.approx(reference.cross_entropy(student[m], label))
        np.testing.assert_allclose(gradient[m], reference.gradient(student[m], np.eye(20)[label]), atol=1e-12)
    np.testing.assert_allclose(values.bucket_kl, taid_loss(torch.tensor(student), targets, t=0.4).bucket_kl, atol=1e-14)


@pytest.mark.parametrize("scale", [1, 10, 40, 400])
@pytest.mark.parametrize("t", [0.1, 0.4, 1.0])
def test_float32_stays_close_to_float64_however_small_the_student_s_tail(scale, t):
    rng = np.random.default_rng(5)
    teacher = log_softmax(6 * rng.standard_normal((64, 300)))
    student = (scale * rng.standard_normal((64, 300))).astype(np.float32)
    draws = [[int(v) for v in rng.choice(np.argsort(-row)[16:], size=m % 4)] for m, row in enumerate(teacher)]
    exact = make_targets(teacher, top_k=16, draws=draws)
    single = dataclasses.replace(exact, logprobs=exact.logprobs.float(), log_tail=exact.log_tail.float())
    values, gradient = value_and_gradient(taid_loss, student, single, t)
    wanted, wanted_gradient = value_and_gradient(taid_loss, student.astype(np.float64), exact, t)
    assert values.loss.dtype == torch.float32
    np.testing.assert_allclose(values.loss.detach(), wanted.loss.detach(), rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(gradient - wanted_gradient) <= 1e-4 * np.linalg.norm(wanted_gradient)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("student_scale", [1.0, 1e4])
def test_finite_where_the_kept_ids_hold_all_the_teacher_s_mass_and_the_student_s_tail_underflows(t, student_scale):
    teacher = torch.tensor([[0.0, -torch.inf]])
    targets = SparseTargets(
        ids=torch.tensor([[2, 2]]),
        logprobs=teacher,
        log_tail=torch.tensor([-60.0]),
        labels=torch.tensor([2]),
        label_logprob=torch.zeros(1),
        draws=torch.zeros((1, 0), dtype=torch.int64),
        draw_counts=torch.zeros(1, dtype=torch.int64),
        row=torch.zeros(1, dtype=torch.int64),
        position=torch.zeros(1, dtype=torch.int64),
    )
    for winner in (2, 0):
        logits = np.zeros((1, 5), np.float32)
        logits[0, winner] = student_scale
        values, gradient = value_and_gradient(taid_loss, logits, targets, t)
        assert values.loss.isfinite().all()
        assert values.bucket_kl.isfinite().all()
        assert np.isfinite(gradient).all()
        assert abs(gradient.sum()) < 1e-5


def test_a_tail_that_underflows_is_still_pulled_up_to_the_teacher_s_mass():
    targets = make_targets(np.log([[0.5, 0.3, 0.2]]), top_k=1, draws=[[]])
    _, gradient = value_and_gradient(taid_loss, np.array([[500.0, 0.0, 0.0]], np.float32), targets, 1.0)
    np.testing.assert_allclose(gradient, [[0.5, -0.25, -0.25]], atol=1e-6)


def test_bfloat16_logits_are_widened_and_their_gradient_comes_back_in_bfloat16(scene):
    student, teacher, draws = scene
    rounded = torch.tensor(student).bfloat16().requires_grad_()
    targets = make_targets(teacher, top_k=7, draws=draws)
    values = taid_loss(rounded, targets, t=0.4)
    values.loss.sum().backward()
    _, wanted = value_and_gradient(taid_loss, rounded.detach().double().numpy(), targets, 0.4)
    assert values.loss.dtype == torch.float32
    assert rounded.grad.dtype == torch.bfloat16
    np.testing.assert_allclose(rounded.grad.double().numpy(), wanted, atol=4e-3)


def test_the_logits_given_are_left_as_they_were(scene):
    student, teacher, draws = scene
    leaf = torch.tensor(student, requires_grad=True)
    taid_loss(leaf, make_targets(teacher, top_k=7, draws=draws), t=0.4)
    np.testing.assert_array_equal(leaf.detach(), student)


def test_weights_on_positions_scale_their_gradients(scene):
    student, teacher, draws = scene
    targets = make_targets(teacher, top_k=7, draws=draws)
    _, plain = value_and_gradient(taid_loss, student, targets, 0.4)
    leaf, weights = torch.tensor(student, requires_grad=True), torch.arange(6.0).double()
    (weights * taid_loss(leaf, targets, t=0.4).loss).sum().backward()
    np.testing.assert_allclose(leaf.grad, weights[:, None].numpy() * plain, atol=1e-14)


def test_cross_entropy_share_mixes_the_two_losses_and_leaves_the_schedule_s_part_alone(scene):
    student, teacher, draws = scene
    targets = make_targets(teacher, top_k=7, draws=draws)
    mixed = build_loss(LossConfig(name="taid", cross_entropy_share=0.25), draws=4)
    values, gradient = value_and_gradient(mixed, student, targets, 0.4)
    taid, taid_gradient = value_and_gradient(taid_loss, student, targets, 0.4)
    labels, labels_gradient = value_and_gradient(cross_entropy_loss, student, targets, 0.4)
    np.testing.assert_allclose(values.loss.detach(), (0.75 * taid.loss + 0.25 * labels.loss).detach(), atol=1e-14)
    np.testing.assert_allclose(gradient, 0.75 * taid_gradient + 0.25 * labels_gradient, atol=1e-14)
    np.testing.assert_array_equal(values.distillation, taid.loss.detach())


def test_auto_tail_takes_the_draws_where_the_dataset_has_some(scene):
    student, teacher, draws = scene
    targets = make_targets(teacher, top_k=7, draws=draws)
    for config, dataset_draws, wanted in (
        ("auto", 4, "mixture"),
        ("auto", 0, "bucket"),
        ("bucket", 4, "bucket"),
        ("mixture", 4, "mixture"),
    ):
        loss = build_loss(LossConfig(name="forward_kl", tail=config), draws=dataset_draws)
        got = value_and_gradient(loss, student, targets, 1.0)[1]
        np.testing.assert_array_equal(got, value_and_gradient(taid_loss, student, targets, 1.0, tail=wanted)[1])


def test_mixture_of_a_dataset_without_draws_is_a_named_error():
    with pytest.raises(NoDraws, match=r"loss\.tail"):
        build_loss(LossConfig(tail="mixture"), draws=0)


def test_only_taid_has_a_schedule():
    assert build_schedule(LossConfig(name="taid")) is not None
    assert build_schedule(LossConfig(name="forward_kl")) is None
    assert build_schedule(LossConfig(name="cross_entropy")) is None
