"""Which loss has which options: the paper's where nothing is said, and a refusal that names what there is."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from coldstill.trainer.config import TrainConfig
from coldstill.trainer.loss_config import OPTIONS, TAILS, LossConfig, LossName, TailName


def test_the_tables_know_every_loss_and_every_tail():
    assert set(OPTIONS) == set(TAILS) == set(get_args(LossName))
    assert {tail for tails in TAILS.values() for tail in tails} | {"auto"} == set(get_args(TailName))
    assert {option for options in OPTIONS.values() for option in options} < set(LossConfig.model_fields)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("taid", {"schedule": "adaptive", "t_start": 0.4, "t_end": 1.0, "alpha": "auto", "beta": 0.99}),
        ("forward_kl", {}),
        ("reverse_kl", {}),
        ("js", {"beta": 0.1}),
        ("tvd", {}),
        ("skew_forward_kl", {"alpha": 0.1}),
        ("skew_reverse_kl", {"alpha": 0.1}),
        ("adaptive_kl", {"mu": 0.5}),
        ("dkd", {"alpha": 1.0, "beta": 0.5}),
        ("ctkd", {}),
        ("cross_entropy", {}),
    ],
)
def test_what_is_left_out_is_the_paper_s(name, wanted):
    assert LossConfig(name=name).options == wanted


def test_what_is_given_is_taken_and_none_is_left_out():
    assert LossConfig(name="js", beta=0.5, alpha=None).options == {"beta": 0.5}
    assert LossConfig(alpha=0.01).options["alpha"] == 0.01


@pytest.mark.parametrize("name", OPTIONS)
def test_survives_being_written_down_and_read_again(name):
    config = LossConfig(name=name)
    assert LossConfig.model_validate(config.model_dump()) == config
    assert LossConfig.model_validate_json(config.model_dump_json()) == config
    assert LossConfig.model_validate(config) == config


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "js", "alpha": 0.1}, "js has no alpha; its options: beta, tail, cross_entropy_share"),
        ({"name": "forward_kl", "t_start": 0.4}, "forward_kl has no t_start; its options: tail, cross_entropy_share"),
        ({"name": "taid", "mu": 0.5}, "taid has no mu; its options: schedule, t_start"),
        ({"name": "cross_entropy", "beta": 0.5}, "cross_entropy has no beta; its options: none"),
        ({"name": "ctkd", "schedule": "linear"}, "ctkd has no schedule; its options: cross_entropy_share"),
        ({"name": "cross_entropy", "cross_entropy_share": 0.1}, "it is nothing else"),
        ({"name": "tvd", "tail": "mixture"}, "tvd has no tail mixture; it has auto, bucket, renormalise"),
        ({"name": "forward_kl", "tail": "mass_corrected"}, "forward_kl has no tail mass_corrected"),
        ({"name": "ctkd", "tail": "bucket"}, "ctkd has no tail bucket; it has auto"),
        ({"name": "js", "beta": 0}, r"beta of js must be in \(0, 1\), not 0"),
        ({"name": "js", "beta": 1}, r"\(0, 1\)"),
        ({"name": "skew_reverse_kl", "alpha": 1}, r"\[0, 1\)"),
        ({"name": "skew_reverse_kl", "alpha": "auto"}, r"alpha of skew_reverse_kl must be in \[0, 1\), not auto"),
        ({"name": "dkd", "beta": -1}, r"\[0, 100\]"),
        ({"alpha": 2}, r"alpha of taid must be auto or in \[0, 1\], not 2"),
        ({"beta": 1}, r"\[0, 1\)"),
        ({"beta": float("nan")}, "not nan"),
        ({"t_start": -0.1}, r"\[0, 1\]"),
        ({"t_start": 0.9, "t_end": 0.5}, "must not be above"),
        ({"cross_entropy_share": 1.5}, "less than or equal to 1"),
        ({"name": "reverse"}, "Input should be"),
        ({"name": ["taid"]}, "Input should be"),
        ({"nmae": "taid"}, "Extra inputs"),
    ],
)
def test_what_a_loss_does_not_have_is_refused_by_name(given, says):
    with pytest.raises(ValidationError, match=says):
        TrainConfig.model_validate({"dataset": "d", "output": "o", "student": {"model": "m"}, "loss": given})


def test_the_edges_that_mean_something_are_allowed():
    assert LossConfig(name="skew_forward_kl", alpha=0).options == {"alpha": 0.0}
    assert LossConfig(t_start=1, t_end=1, alpha=0, beta=0).options["alpha"] == 0.0


def test_every_key_has_a_sentence():
    for name, field in LossConfig.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
