"""From a configuration to an objective: which one, with which tail, and what is said about the dataset."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from coldstill.trainer.errors import DenseLossOnly, NoDrawLogprobs, NoDraws
from coldstill.trainer.loss_config import OPTIONS, TAILS, LossConfig
from coldstill.trainer.losses import Objective, build_objective, build_schedule, memory_of
from coldstill.trainer.losses.adaptive_kl import AdaptiveKl
from coldstill.trainer.losses.cross_entropy import CrossEntropy
from coldstill.trainer.losses.ctkd import Ctkd
from coldstill.trainer.losses.divergences import JensenShannon, ReverseKl, SkewForwardKl, SkewReverseKl, TotalVariation
from coldstill.trainer.losses.dkd import Dkd
from coldstill.trainer.losses.mass_corrected import MassCorrectedTaid
from coldstill.trainer.losses.taid import AtTeacher, ForwardKl, Taid
from coldstill.trainer.losses.truncated import RenormalisedTaid, ZeroTailTaid
from coldstill.trainer.losses.uniform_tail import UniformTail, UniformTailObjective
from tests import reference
from tests.trainer.losses.scenes import cut, scene, value_and_gradient


def build(name: str, *, draws: int = 4, mass: float = 0.01, dense: bool = False, **options) -> Objective:
    return build_objective(
        LossConfig(name=name, **options), draws=draws, mean_tail_mass=mass, dense=dense, draw_logprobs=True
    )


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("taid", {}, Taid("mixture")),
        ("taid", {"tail": "bucket"}, Taid("bucket")),
        ("taid", {"tail": "renormalise"}, RenormalisedTaid()),
        ("taid", {"tail": "zero"}, ZeroTailTaid()),
        ("taid", {"tail": "uniform"}, UniformTail()),
        ("forward_kl", {}, ForwardKl("mixture")),
        ("forward_kl", {"tail": "renormalise"}, AtTeacher(RenormalisedTaid())),
        ("forward_kl", {"tail": "zero"}, AtTeacher(ZeroTailTaid())),
        ("forward_kl", {"tail": "uniform"}, UniformTail(at_teacher=True)),
        ("reverse_kl", {}, ReverseKl()),
        ("reverse_kl", {"tail": "renormalise"}, ReverseKl(tail="renormalise")),
        ("js", {}, JensenShannon(beta=0.1)),
        ("js", {"beta": 0.5}, JensenShannon(beta=0.5)),
        ("tvd", {}, TotalVariation()),
        ("skew_forward_kl", {}, SkewForwardKl(alpha=0.1)),
        ("skew_reverse_kl", {"alpha": 0.2}, SkewReverseKl(alpha=0.2)),
        ("adaptive_kl", {}, AdaptiveKl(mu=0.5)),
        ("adaptive_kl", {"mu": 0.7}, AdaptiveKl(mu=0.7)),
        ("dkd", {}, Dkd(alpha=1.0, beta=0.5)),
        ("dkd", {"beta": 8.0}, Dkd(alpha=1.0, beta=8.0)),
    ],
)
def test_a_name_and_its_options_are_one_loss(name, options, wanted):
    assert build(name, **options).distillation == wanted


def test_the_losses_that_remember_hand_out_their_memory_and_the_others_none():
    remembering = [build("taid", tail="mass_corrected"), build("ctkd", dense=True)]
    assert [type(it.distillation) for it in remembering] == [MassCorrectedTaid, Ctkd]
    for objective in remembering:
        assert memory_of(objective) is objective.distillation.memory
    assert memory_of(build("taid")) is None
    assert memory_of(build("taid", tail="mass_corrected")) is not memory_of(remembering[0])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_loss_with_every_tail_runs_with_a_share_of_cross_entropy(name):
    student, teacher, draws = scene()
    dense = name == "ctkd"
    targets = cut(teacher, top_k=20 if dense else 7, draws=None if dense else draws)
    share = {} if name == "cross_entropy" else {"cross_entropy_share": 0.25}
    labels, of_labels = value_and_gradient(CrossEntropy(), student, targets)
    for tail in ("auto", *TAILS[name]):
        alone, of_teacher = value_and_gradient(build(name, tail=tail, dense=dense), student, targets, 0.4)
        mixed, gradient = value_and_gradient(build(name, tail=tail, dense=dense, **share), student, targets, 0.4)
        part = share.get("cross_entropy_share", 0.0)
        np.testing.assert_allclose(mixed.loss, (1 - part) * alone.loss + part * labels.loss, atol=1e-13)
        np.testing.assert_allclose(gradient, (1 - part) * of_teacher + part * of_labels, atol=1e-13)
        # The schedule of t listens to the teacher's part alone.
        np.testing.assert_array_equal(mixed.distillation, alone.loss)


def test_cross_entropy_reads_the_labels_alone():
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    values, gradient = value_and_gradient(build("cross_entropy"), student, targets)
    for m in range(6):
        label = int(targets.labels[m])
        assert values.loss[m].item() == pytest.approx(reference.cross_entropy(student[m], label))
        np.testing.assert_allclose(gradient[m], reference.gradient(student[m], np.eye(20)[label]), atol=1e-12)


@pytest.mark.parametrize("name", ["taid", "forward_kl"])
def test_auto_takes_the_draws_where_the_dataset_has_some(name):
    assert build(name, draws=4).distillation.tail == "mixture"
    assert build(name, draws=0).distillation.tail == "bucket"


@pytest.mark.parametrize("tail", ["mixture", "mass_corrected"])
def test_a_tail_of_draws_from_a_dataset_without_any_is_a_named_error(tail):
    with pytest.raises(NoDraws, match=r"loss\.tail"):
        build("taid", tail=tail, draws=0)


def test_the_corrected_mass_of_a_dataset_without_log_probs_of_its_draws_is_a_named_error():
    with pytest.raises(NoDrawLogprobs, match="draw_logprobs"):
        build_objective(LossConfig(tail="mass_corrected"), draws=4, mean_tail_mass=0.01, draw_logprobs=False)


def test_ctkd_of_a_truncated_dataset_is_a_named_error_with_the_mass_that_is_missing():
    with pytest.raises(DenseLossOnly, match=r"0\.0123"):
        build("ctkd", mass=0.0123)
    assert isinstance(build("ctkd", mass=0.0, dense=True), Objective)


def messages(caplog: pytest.LogCaptureFixture, name: str, **facts) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="coldstill.trainer.losses.build"):
        build(name, **facts)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "name", ["reverse_kl", "js", "tvd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "dkd"]
)
def test_a_loss_that_the_cache_only_bounds_says_so_with_the_mean_tail_mass(name, caplog):
    (line,) = messages(caplog, name, mass=0.0123)
    assert name in line
    assert "0.0123" in line
    assert messages(caplog, name, mass=0.0, dense=True) == []


@pytest.mark.parametrize("name", ["taid", "forward_kl"])
def test_the_bucket_warns_where_the_mean_tail_mass_is_above_5_percent(name, caplog):
    (line,) = messages(caplog, name, draws=0, mass=0.0623)
    assert "0.0623" in line
    assert messages(caplog, name, draws=0, mass=0.04) == []
    assert messages(caplog, name, draws=4, mass=0.0623) == []
    (line,) = messages(caplog, name, draws=4, tail="bucket", mass=0.0623)
    assert "bucket" in line


@pytest.mark.parametrize("tail", ["renormalise", "zero", "uniform"])
def test_the_tails_for_comparison_say_that_they_are(tail, caplog):
    (line,) = messages(caplog, "taid", tail=tail)
    assert tail in line


def test_cross_entropy_has_nothing_to_say(caplog):
    assert messages(caplog, "cross_entropy", mass=0.5) == []


def test_the_uniform_tail_is_an_objective_of_its_own():
    assert isinstance(build("taid", tail="uniform"), UniformTailObjective)


def test_only_taid_has_a_schedule():
    schedule = build_schedule(LossConfig(t_start=0.2, alpha=0.01, schedule="linear"))
    assert schedule is not None
    assert (schedule.kind, schedule.t_start, schedule.t_end, schedule.alpha) == ("linear", 0.2, 1.0, 0.01)
    assert schedule.beta == 0.99
    for name in OPTIONS:
        assert (build_schedule(LossConfig(name=name)) is not None) == (name == "taid")
