"""Laws of every loss: a complete record, the objective it becomes on a dataset, and what it needs of the dataset."""

from __future__ import annotations

import logging
import re
from typing import Literal

import numpy as np
import pytest
from pydantic import Field

from coldstill.trainer.errors import DenseLossOnly, NoDrawLogprobs, NoDraws
from coldstill.trainer.finished_student import model_card
from coldstill.trainer.loss_kernels.fused_head import Objective
from coldstill.trainer.losses import LOSSES, read_loss
from coldstill.trainer.losses.adaptive_kl import AdaptiveKl
from coldstill.trainer.losses.base import Loss, LossState, TeacherLoss, build_objective, state_of
from coldstill.trainer.losses.cross_entropy import CrossEntropy
from coldstill.trainer.losses.divergences import JensenShannon, ReverseKl, SkewForwardKl, SkewReverseKl, TotalVariation
from coldstill.trainer.losses.dkd import Dkd
from coldstill.trainer.losses.lightning_opd import LightningOpd
from coldstill.trainer.losses.taid import ForwardKl, MassCorrectedTaid, Taid
from tests import reference
from tests.trainer.losses.scenes import cut, scene, value_and_gradient


def build(name: str, *, draws: int = 4, mass: float = 0.01, dense: bool = False, **options) -> Objective:
    return build_objective(
        read_loss({"name": name, **options}),
        draws=draws,
        mean_tail_mass=mass,
        dense=dense,
        draw_logprobs=True,
        not_by_student=(),
    )


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("taid", {}, Taid(tail="mixture")),
        ("taid", {"tail": "bucket"}, Taid(tail="bucket")),
        ("forward_kl", {}, ForwardKl(tail="mixture")),
        ("reverse_kl", {}, ReverseKl(tail="bucket")),
        ("js", {}, JensenShannon(beta=0.1, tail="bucket")),
        ("js", {"beta": 0.5}, JensenShannon(beta=0.5, tail="bucket")),
        ("tvd", {}, TotalVariation(tail="bucket")),
        ("skew_forward_kl", {}, SkewForwardKl(alpha=0.1, tail="bucket")),
        ("skew_reverse_kl", {"alpha": 0.2}, SkewReverseKl(alpha=0.2, tail="bucket")),
        ("adaptive_kl", {}, AdaptiveKl(mu=0.5, tail="bucket")),
        ("adaptive_kl", {"mu": 0.7}, AdaptiveKl(mu=0.7, tail="bucket")),
        ("dkd", {}, Dkd(alpha=1.0, beta=0.5, tail="bucket")),
        ("dkd", {"beta": 8.0}, Dkd(alpha=1.0, beta=8.0, tail="bucket")),
        ("lightning_opd", {}, LightningOpd(any_rows=False)),
    ],
)
def test_a_name_and_its_options_are_one_loss(name, options, wanted):
    assert build(name, **options).distillation == wanted


def test_a_loss_with_a_state_gives_each_objective_its_own_and_the_others_have_none():
    corrected = [build("taid", tail="mass_corrected") for _ in range(2)]
    for objective in corrected:
        assert isinstance(objective.distillation, MassCorrectedTaid)
        assert isinstance(state_of(objective), LossState)
        assert state_of(objective) is objective.distillation.state
    assert state_of(corrected[0]) is not state_of(corrected[1])
    assert [state_of(build(name)) for name in LOSSES] == [None] * len(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_with_every_tail_runs_with_a_share_of_cross_entropy(name):
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    share = {} if name == "cross_entropy" else {"cross_entropy_share": 0.25}
    labels, of_labels = value_and_gradient(CrossEntropy(), student, targets)
    for tail in ("auto", *LOSSES[name].tails()) if LOSSES[name].tails() else (None,):
        alone, of_teacher = value_and_gradient(build(name, tail=tail), student, targets, 0.4)
        mixed, gradient = value_and_gradient(build(name, tail=tail, **share), student, targets, 0.4)
        part = share.get("cross_entropy_share", 0.0)
        np.testing.assert_allclose(mixed.loss, (1 - part) * alone.loss + part * labels.loss, atol=1e-13)
        np.testing.assert_allclose(gradient, (1 - part) * of_teacher + part * of_labels, atol=1e-13)
        # The schedule of t follows the teacher's part only.
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


@pytest.mark.parametrize("tail", ["mixture", "mass_corrected", "control_variate"])
def test_a_tail_of_draws_from_a_dataset_without_any_is_a_named_error(tail):
    with pytest.raises(NoDraws, match=r"loss\.tail"):
        build("taid", tail=tail, draws=0)


@pytest.mark.parametrize("tail", ["mass_corrected", "control_variate"])
def test_a_tail_that_needs_the_log_probs_of_draws_is_a_named_error_without_them(tail):
    with pytest.raises(NoDrawLogprobs, match="draw_logprobs"):
        build_objective(Taid(tail=tail), draws=4, mean_tail_mass=0.01, draw_logprobs=False)


class WholeVocabulary(Taid):
    """A loss that a truncated cache cannot serve."""

    needs = frozenset({"dense"})


def test_a_dense_loss_on_a_truncated_dataset_is_a_named_error_with_the_mass_that_is_missing():
    with pytest.raises(DenseLossOnly, match=r"0\.0123"):
        build_objective(WholeVocabulary(), draws=4, mean_tail_mass=0.0123)
    assert isinstance(build_objective(WholeVocabulary(), draws=4, mean_tail_mass=0.0, dense=True), Objective)


class Drawn(CrossEntropy):
    """A loss without tails that reads draws."""

    needs = frozenset({"draws", "draw_logprobs"})


def test_what_a_loss_needs_with_any_tail_is_checked_too():
    with pytest.raises(NoDraws, match=r"loss\.name"):
        build_objective(Drawn(), draws=0, mean_tail_mass=0.1)
    with pytest.raises(NoDrawLogprobs, match=r"loss\.name"):
        build_objective(Drawn(), draws=4, mean_tail_mass=0.1)
    build_objective(Drawn(), draws=4, mean_tail_mass=0.1, draw_logprobs=True)


@pytest.mark.parametrize("lacking", ["title", "arxiv", "__call__"])
def test_a_loss_whose_record_is_not_complete_cannot_be_defined(lacking):
    parts = {"title": "a title", "arxiv": None, "__call__": CrossEntropy.__call__}
    fields = {"name": Field("mine", description="Mine.")}
    complete = {"__annotations__": {"name": Literal["mine"]}, "__module__": __name__, **fields, **parts}
    assert type(TeacherLoss)("Mine", (TeacherLoss,), dict(complete))().name == "mine"
    del complete[lacking]
    with pytest.raises(TypeError, match=lacking):
        type(TeacherLoss)("Mine", (TeacherLoss,), dict(complete))


def test_an_option_without_a_sentence_cannot_be_defined():
    with pytest.raises(TypeError, match="a description of sharpness"):

        class Mine(CrossEntropy):
            sharpness: float = 1.0


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_record_is_complete_and_the_card_of_every_loss_can_be_made(loss: type[Loss]):
    assert LOSSES[loss().name] is loss
    assert loss.title
    assert loss.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}", loss.arxiv)
    record = {"targets": 3, "schedule": {"t": 0.5} if loss().new_schedule() else None}
    card = model_card(student="s", headers=[], dataset_ids=["d"], loss=loss(), record=record, steps=2, adapters=False)
    assert loss.title in card
    assert loss.arxiv is None or f"arXiv {loss.arxiv}" in card


def messages(caplog: pytest.LogCaptureFixture, name: str, **facts) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="coldstill.trainer.losses.base"):
        build(name, **facts)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "name", ["reverse_kl", "js", "tvd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "dkd"]
)
def test_a_loss_that_is_only_a_bound_logs_this_with_the_mean_tail_mass(name, caplog):
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


def test_cross_entropy_has_nothing_to_say(caplog):
    assert messages(caplog, "cross_entropy", mass=0.5) == []


def test_only_taid_has_a_schedule():
    schedule = Taid(t_start=0.2, alpha=0.01, schedule="linear").new_schedule()
    assert (schedule.kind, schedule.t_start, schedule.t_end, schedule.alpha) == ("linear", 0.2, 1.0, 0.01)
    assert schedule.beta == 0.99
    for name, loss in LOSSES.items():
        assert (loss().new_schedule() is not None) == (name == "taid")


def test_eval_loss_is_the_labels_for_cross_entropy_and_the_best_kl_for_all_others():
    kl = ("forward_kl_estimate", "soft_cross_entropy_estimate", "forward_kl_lower_bound")
    for name, loss in LOSSES.items():
        assert loss.eval_loss == (("cross_entropy",) if name == "cross_entropy" else kl)
