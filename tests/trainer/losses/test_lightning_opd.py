"""Lightning OPD: its gradient, by enumeration of a vocabulary, and which rows it is refused on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coldstill import load_logit_dataset
from coldstill.storage_schema.header_facts import About, RowWriter, TeacherPrompt
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.errors import NotStudentRows
from coldstill.trainer.losses.lightning_opd import LightningOpd
from coldstill.trainer.train import train
from tests import making, reference
from tests.trainer.losses.scenes import cut, log_softmax, scene, value_and_gradient
from tests.trainer.training import build

WRITER = RowWriter(name="student", weights_fingerprint="1" * 64, round=0)


def test_the_value_and_the_gradient_are_those_of_the_formula():
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    values, gradient = value_and_gradient(LightningOpd(), student, targets)
    for m, label in enumerate(targets.labels.tolist()):
        q = reference.softmax(student[m])
        advantage = teacher[m, label] - np.log(q[label])
        assert values.loss[m].item() == pytest.approx(-advantage * np.log(q[label]), abs=1e-12)
        np.testing.assert_allclose(gradient[m], advantage * (q - np.eye(q.size)[label]), atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 3])
def test_over_what_the_writer_samples_the_gradient_is_that_of_reverse_kl_and_k_does_not_matter(top_k):
    rng = np.random.default_rng(3)
    student, teacher = rng.standard_normal((2, 5)) * 1.5, log_softmax(rng.standard_normal((2, 5)) * 2)
    for m in range(2):
        # Every label once, weighted by the probability with which the student writes it.
        targets = cut(np.repeat(teacher[m : m + 1], 5, 0), top_k=top_k, labels=range(5))
        _, gradient = value_and_gradient(LightningOpd(), np.repeat(student[m : m + 1], 5, 0), targets)
        expected = reference.softmax(student[m]) @ gradient

        def reverse_kl(z: np.ndarray, p: np.ndarray = teacher[m]) -> float:
            q = reference.softmax(z)
            return float(q @ (np.log(q) - p))

        np.testing.assert_allclose(expected, reference.slope(reverse_kl, student[m]), atol=1e-8)


def _dataset(root: Path, tokenizer: Path, *, writer: RowWriter | None, seed: int, **about: TeacherPrompt) -> Path:
    rng = np.random.default_rng(seed)
    header = making.tiny_header(tokenizer, about=About(writer=writer, **about))
    rows = [[making.random_row(rng, f"row-{seed}-{number}") for number in range(8)]]
    making.write_dataset(root, rows, header=header, tokenizer=tokenizer)
    return root


def test_rows_that_no_student_wrote_are_refused_at_every_entrance_and_named(tmp_path, tokenizer_folder, tiny_student):
    own = _dataset(tmp_path / "own", tokenizer_folder, writer=WRITER, seed=0)
    other = _dataset(tmp_path / "other", tokenizer_folder, writer=None, seed=1)
    trainer, _ = build(own, tiny_student, tmp_path / "a", loss="lightning_opd")
    assert trainer.distillation_loss == LightningOpd()
    mix = load_logit_dataset([own, other])
    prompted = TeacherPrompt(kind="system", sha256="0" * 64)
    under = _dataset(tmp_path / "under", tokenizer_folder, writer=WRITER, seed=2, writer_prompt=prompted)
    for dataset, named in ((other, other), (mix, other), (under, under)):
        with pytest.raises(NotStudentRows, match=str(named)):
            build(dataset, tiny_student, tmp_path / "b", loss="lightning_opd")
    config = {"output": str(tmp_path / "run"), "student": {"model": str(tiny_student)}, "training": {"max_steps": 1}}
    for dataset in (str(other), [str(own), str(other)]):
        document = {**config, "dataset": dataset, "loss": {"name": "lightning_opd"}}
        with pytest.raises(NotStudentRows, match=r"loss\.any_rows"):
            train(TrainConfig.model_validate({**document, "output": str(tmp_path / f"run {type(dataset)}")}))
    build(mix, tiny_student, tmp_path / "c", loss={"name": "lightning_opd", "any_rows": True})
    trained = train(TrainConfig.model_validate({**config, "dataset": str(own), "loss": {"name": "lightning_opd"}}))
    assert trained.loss == "lightning_opd"
