"""The settings of training: descriptions, defaults, and invalid combinations."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from coldstill.trainer.config import DataConfig, LoraConfig, StudentConfig, TrainConfig, TrainingConfig
from coldstill.trainer.losses import LOSSES, PluginLoss

SECTIONS: list[type[BaseModel]] = [
    TrainConfig,
    StudentConfig,
    LoraConfig,
    DataConfig,
    TrainingConfig,
    PluginLoss,
    *LOSSES.values(),
]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_sentence(section):
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_three_keys_are_enough():
    config = TrainConfig.model_validate({"dataset": "d", "output": "o", "student": {"model": "m"}})
    assert (config.loss.name, config.loss.t_start, config.loss.alpha) == ("taid", 0.4, "auto")


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": {"nmae": "taid"}},
        {"loss": {"name": "reverse"}},
        {"loss": {"t_start": 0.9, "t_end": 0.5}},
        {"loss": {"alpha": 2}},
        {"training": {"learning_rate": 0}},
        {"training": {"warmup_ratio": 1}},
        {"training": {"early_stopping_patience": 2}, "eval_dataset": "e"},
        {"training": {"best_metric": "eval_loss"}},
        {"student": {}},
        {"student": {"model": "m", "from_scratch": "c"}},
        {"student": {"from_scratch": {"hidden_size": 8}}},
        {"student": {"from_scratch": "c", "lora": {}}},
        {"student": {"model": "m", "lora": {"r": 0}}},
        {"teacher": "x"},
    ],
)
def test_invalid_settings_are_errors(wrong):
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({"dataset": "d", "output": "o", "student": {"model": "m"}, **wrong})
