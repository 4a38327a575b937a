"""The page `docs/adding_a_loss.md` works: its loss is defined, correct, and trains, as the page states."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from transformers import TrainingArguments

from coldstill import DistillTrainer, load_logit_dataset
from coldstill.common.plugins import load_plugin
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.loss_kernels.fused_head import Objective
from coldstill.trainer.losses import read_loss
from coldstill.trainer.train import train
from tests.trainer.losses.scenes import cut, scene, value_and_gradient
from tests.trainer.training import weights_of

PAGE = Path(__file__).parents[3] / "docs/adding_a_loss.md"


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[number]


@pytest.fixture
def hellinger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "hellinger.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield load_plugin("hellinger:Hellinger", key="loss.name")
    del sys.modules["hellinger"]


@pytest.mark.parametrize("exponent", [0.5, 0.3])
def test_its_gradient_is_autograd_s_on_dense_logits(hellinger, exponent):
    student, teacher, _ = scene()
    values, gradient = value_and_gradient(hellinger(exponent=exponent), student, cut(teacher, top_k=20))
    logits, log_p = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
    dense = 1 - (exponent * log_p + (1 - exponent) * logits.log_softmax(1)).exp().sum(1)
    np.testing.assert_allclose(values.loss, dense.detach(), atol=1e-12)
    np.testing.assert_allclose(gradient, torch.autograd.grad(dense.sum(), logits)[0], atol=1e-12)


def test_on_a_truncated_cache_it_is_a_lower_bound(hellinger):
    student, teacher, _ = scene()
    found, _ = value_and_gradient(Objective(hellinger()), student, cut(teacher, top_k=7, pads=2))
    dense, _ = value_and_gradient(Objective(hellinger()), student, cut(teacher, top_k=20))
    assert (found.loss < dense.loss).all()


def test_the_section_of_the_page_means_it(hellinger):
    section = yaml.safe_load(block("yaml"))
    config = TrainConfig.model_validate({"dataset": "d", "output": "o", "student": {"model": "m"}, **section})
    assert read_loss(config.loss) == hellinger(exponent=0.3)


def test_it_trains_as_the_page_writes_it(hellinger, tiny_dataset: Path, tiny_student: Path, tmp_path: Path):
    args = TrainingArguments(str(tmp_path / "out"), max_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True)
    names = {
        "DistillTrainer": DistillTrainer,
        "Hellinger": hellinger,
        "model": str(tiny_student),
        "args": args,
        "dataset": load_logit_dataset(str(tiny_dataset)),
    }
    trainer = eval(block("python", 1), names)
    before = weights_of(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 1
    assert any(not torch.equal(before[name], weight) for name, weight in weights_of(trainer.model).items())


def test_a_whole_run_from_a_configuration_ends_with_its_card(hellinger, tiny_dataset, tiny_student, tmp_path):
    config = TrainConfig.model_validate(
        {
            "dataset": str(tiny_dataset),
            "output": str(tmp_path / "run"),
            "student": {"model": str(tiny_student)},
            "training": {"max_steps": 1, "dataloader_workers": 0},
            **yaml.safe_load(block("yaml")),
        }
    )
    assert train(config).loss == "hellinger:Hellinger"
    assert "squared Hellinger distance, tail: bucket" in (tmp_path / "run/student/README.md").read_text()
