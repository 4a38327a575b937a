"""What a training run can be told, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from trainer.config import DataConfig, LossConfig, StudentConfig, TrainConfig, TrainingConfig

SECTIONS: list[type[BaseModel]] = [TrainConfig, StudentConfig, LossConfig, DataConfig, TrainingConfig]


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
        {"teacher": "x"},
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({"dataset": "d", "output": "o", "student": {"model": "m"}, **wrong})


def test_reading_the_configuration_loads_neither_torch_nor_transformers():
    program = "import sys, trainer.config; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
