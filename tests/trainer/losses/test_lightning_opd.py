"""Lightning OPD: its gradient, by enumeration of a vocabulary, and which rows it is refused on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from coldstill import load_logit_dataset
from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.teachers.adapter import Adapter
from coldstill.storage_schema.header_facts import About, RowWriter, TeacherPrompt, weights_fingerprint
from coldstill.trainer.config import StudentConfig, TrainConfig
from coldstill.trainer.errors import NotStudentRows
from coldstill.trainer.losses.lightning_opd import LightningOpd
from coldstill.trainer.student.writer import check_writers, foreign_writers, student_fingerprints
from coldstill.trainer.train import train
from tests import making, reference
from tests.trainer.losses.scenes import cut, log_softmax, scene, value_and_gradient
from tests.trainer.training import build

OTHER = RowWriter(name="student", weights_fingerprint="1" * 64, round=0)


def _writer(student: Path, *, round: int = 0) -> RowWriter:
    return RowWriter(name=student.name, weights_fingerprint=weights_fingerprint(student), round=round)


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
    own = _dataset(tmp_path / "own", tokenizer_folder, writer=_writer(tiny_student), seed=0)
    other = _dataset(tmp_path / "other", tokenizer_folder, writer=None, seed=1)
    trainer, _ = build(own, tiny_student, tmp_path / "a", loss="lightning_opd")
    assert trainer.distillation_loss == LightningOpd()
    mix = load_logit_dataset([own, other])
    prompted = TeacherPrompt(kind="system", sha256="0" * 64)
    under = _dataset(tmp_path / "under", tokenizer_folder, writer=_writer(tiny_student), seed=2, writer_prompt=prompted)
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


def test_rows_of_another_model_are_refused_by_its_name_and_those_of_earlier_rounds_are_not(
    tmp_path, tokenizer_folder, tiny_student
):
    other = _dataset(tmp_path / "other", tokenizer_folder, writer=OTHER, seed=0)
    own = _dataset(tmp_path / "own", tokenizer_folder, writer=_writer(tiny_student, round=1), seed=1)
    same_round = _dataset(tmp_path / "same round", tokenizer_folder, writer=_writer(tiny_student), seed=2)
    for student in (tiny_student, StudentConfig(model=str(tiny_student)), str(tiny_student)):
        with pytest.raises(NotStudentRows, match="rows that student wrote in round 0, weights 1111"):
            build(load_logit_dataset(other), student, tmp_path / "a", loss="lightning_opd")
    scratch = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    scratch |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    with pytest.raises(NotStudentRows, match="student from scratch"):
        build(load_logit_dataset(other), StudentConfig(from_scratch=scratch), tmp_path / "a", loss="lightning_opd")
    with pytest.raises(NotStudentRows, match=r"other\b"):
        build(load_logit_dataset([other, same_round]), tiny_student, tmp_path / "a", loss="lightning_opd")
    build(load_logit_dataset([other, own]), tiny_student, tmp_path / "b", loss="lightning_opd")
    build(other, tiny_student, tmp_path / "c", loss={"name": "lightning_opd", "any_rows": True})
    build(other, tiny_student, tmp_path / "d", loss="forward_kl")


def test_one_model_may_have_written_each_earlier_round():
    def by(weights: str, round: int) -> RowWriter:
        return RowWriter(name="any", weights_fingerprint=weights, round=round)

    first, second, stranger = by("a", 0), by("b", 1), by("x", 0)
    assert foreign_writers([first, second, by("c", 2)], own="c") == []
    assert foreign_writers([first, second], own="c") == [first, second]
    assert foreign_writers([first, second, by("c", 1)], own="c") == [second]
    assert foreign_writers([first, stranger, second], own="b") == [first, stranger]
    assert foreign_writers([first], own=None) == [first]


def test_an_adapter_is_known_by_its_base_and_its_own_files(tmp_path, tiny_student):
    adapter = making.lora_adapter(tmp_path / "adapter", tiny_student)
    base = weights_fingerprint(tiny_student)
    assert student_fingerprints(str(tiny_student)) == (base,)
    facts = Adapter(TeacherConfig(model=str(tiny_student), adapter=str(adapter), engine="transformers")).facts
    assert student_fingerprints(str(adapter)) == (f"{base} + {facts.weights_fingerprint}",)
    assert student_fingerprints(str(tmp_path / "missing")) == ()


@pytest.fixture
def hub_copy(tmp_path, tiny_student, monkeypatch):
    """A student in the Hub's cache of this machine, without a network, beside the folder that it is a copy of."""
    commit = making.in_hub_cache(tiny_student, tmp_path / "cache", "org/student", monkeypatch)
    return RowWriter(name="org/student", revision=commit, weights_fingerprint=f"commit:{commit}", round=0)


def test_a_student_of_the_hub_and_a_copy_in_a_folder_are_the_same_writer(
    hub_copy, tmp_path, tokenizer_folder, tiny_student
):
    """Whichever of them wrote the rows, and whichever is trained; another model in a folder is still refused."""
    by_hub = _dataset(tmp_path / "by hub", tokenizer_folder, writer=hub_copy, seed=0)
    by_folder = _dataset(tmp_path / "by folder", tokenizer_folder, writer=_writer(tiny_student), seed=1)
    changed = making.tiny_llama(tmp_path / "changed", seed=5)
    mix = load_logit_dataset([by_hub, by_folder])
    loss = LightningOpd()
    for student in ("org/student", str(tiny_student)):
        check_writers(loss, mix, student)
    check_writers(loss, mix, AutoModelForCausalLM.from_pretrained("org/student"))
    with pytest.raises(NotStudentRows, match=r"set student\.model: org/student if the folder is a copy of it"):
        check_writers(loss, load_logit_dataset(by_hub), str(changed))
    with pytest.raises(NotStudentRows, match="rows that"):
        check_writers(loss, load_logit_dataset(by_folder), str(changed))


def test_without_the_weights_of_the_hub_on_this_machine_the_error_names_the_way_out(
    hub_copy, tmp_path, tokenizer_folder, tiny_student
):
    shutil.rmtree(tmp_path / "cache")
    by_hub = _dataset(tmp_path / "by hub", tokenizer_folder, writer=hub_copy, seed=0)
    with pytest.raises(NotStudentRows, match=r"set student\.model: org/student if the folder is a copy of it"):
        check_writers(LightningOpd(), load_logit_dataset(by_hub), str(tiny_student))


def test_with_several_teachers_the_gradient_is_the_weighted_sum_and_every_dataset_needs_the_writer(
    tmp_path, tokenizer_folder, tiny_student
):
    """The advantage is that over the teachers' weighted geometric mean."""

    def scored(name: str, *, seed: int, writer: RowWriter) -> Path:
        rng, teachers = np.random.default_rng(5), np.random.default_rng(seed)
        rows = []
        for number in range(4):
            row = making.random_row(rng, f"row-{number}")
            probs = making.random_probs(teachers, row.labels.size, making.VOCABULARY)
            targets = making.targets_of(probs, row.labels, top_k=8, draws=4)
            rows.append(dataclasses.replace(row, targets=targets))
        header = making.tiny_header(tokenizer_folder, about=About(writer=writer))
        making.write_dataset(tmp_path / name, [rows], header=header, tokenizer=tokenizer_folder)
        return tmp_path / name

    paths = [str(scored(f"t{seed}", seed=seed, writer=_writer(tiny_student))) for seed in (1, 2)]
    weights = [0.25, 0.75]
    found = {}
    for name, dataset in {
        "both": load_logit_dataset(ensemble=paths, ensemble_weights=weights),
        **{path: load_logit_dataset(path) for path in paths},
    }.items():
        trainer, gradients = build(
            dataset, tiny_student, tmp_path / "run", loss="lightning_opd", max_steps=1, learning_rate=0.0
        )
        trainer.train()
        (found[name],) = gradients.steps
    expected = weights[0] * found[paths[0]] + weights[1] * found[paths[1]]
    assert expected.abs().max() > 1e-3
    np.testing.assert_allclose(found["both"], expected, atol=1e-6)
    strange = str(scored("strange", seed=3, writer=OTHER))
    with pytest.raises(NotStudentRows, match="strange"):
        build(load_logit_dataset(ensemble=[paths[0], strange]), tiny_student, tmp_path / "x", loss="lightning_opd")
