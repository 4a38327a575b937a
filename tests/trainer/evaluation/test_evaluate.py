"""The figures of an evaluation: each against its definition written out slowly, whatever the batches are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coldstill.storage_schema.dataset import open_dataset
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.errors import NonFiniteLogits, NoTargets, TeacherSawAnotherPrompt
from coldstill.trainer.evaluation.evaluate import evaluate_on_dataset, evaluate_student
from coldstill.trainer.evaluation.figures import draws_per_position
from coldstill.trainer.evaluation.report import EvaluationReport
from tests import making
from tests.trainer.evaluation import reference
from tests.trainer.evaluation.batches import Row, batches_of, load, packed, padded, random_rows, student_probs

V = making.VOCABULARY
D = 6


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> Any:
    return load(tiny_student)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(making.tiny_llama(tmp_path_factory.mktemp("teacher"), seed=5, hidden_size=48))


def measure(model: Any, rows: list[Row], *, size: int = 5, pack: bool = False, **options: Any) -> EvaluationReport:
    batches = batches_of([row for row, _ in rows], size, pack=pack)
    return evaluate_student(model, batches, token_count=V, **options)


def expected(model: Any, rows: list[Row]) -> dict[str, float]:
    """Means over all positions of the definitions, position by position."""
    values: dict[str, list[float]] = {}
    for row, teacher_probs in rows:
        for n, (p, q) in enumerate(zip(teacher_probs, student_probs(model, row), strict=True)):
            label = int(row.token_ids[row.positions[n] + 1])
            kept = row.targets.ids[n, : row.targets.counts[n]].tolist()
            head = reference.ranked(p)[: min(10, len(kept))]
            favorite = int(np.argmax(q))
            for name, value in {
                "cross_entropy": -math.log(q[label]),
                "teacher_cross_entropy": -math.log(p[label]),
                "forward_kl_lower_bound": reference.kl(reference.bucket(p, kept), reference.bucket(q, kept)),
                "reverse_kl_lower_bound": reference.kl(reference.bucket(q, kept), reference.bucket(p, kept)),
                "top1_agreement": favorite == int(np.argmax(p)),
                "accuracy": favorite == label,
                "confidence": q[favorite],
                "head_mass": reference.mass(q, head),
                "rest_mass": 1 - reference.mass(q, head),
                "tail_mass": 1 - reference.mass(q, kept),
                "teacher_head_mass": reference.mass(p, head),
                "teacher_tail_mass": 1 - reference.mass(p, kept),
            }.items():
                values.setdefault(name, []).append(float(value))
    means = {name: float(np.mean(found)) for name, found in values.items()}
    hits = [bool(hit) for hit in values["accuracy"]]
    return {
        **means,
        "targets": len(hits),
        "perplexity": math.exp(means["cross_entropy"]),
        "expected_calibration_error": reference.expected_calibration_error(values["confidence"], hits),
    }


@pytest.mark.parametrize("cache", [{"top_k": 8}, {"top_k": 16}, {"top_k": 16, "min_prob": 0.02}, {"top_k": 1}], ids=str)
def test_each_figure_is_its_definition(student: Any, cache: dict[str, Any]) -> None:
    rows = random_rows(1, 9, **cache)
    found, wanted = measure(student, rows).metrics(), expected(student, rows)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=2e-6, abs=1e-7), name


@pytest.mark.parametrize("options", [{}, {"draws": D}], ids=["without draws", "with draws"])
def test_the_numbers_do_not_depend_on_batches_packing_or_chunks(student: Any, teacher: Any, options: dict) -> None:
    rows = random_rows(2, 11, draws=D)
    whole = measure(student, rows, size=11, teacher=teacher, **options).metrics()
    for other in (
        {"size": 1},
        {"size": 5},
        {"size": 4, "pack": True},
        {"size": 11, "pack": True},
        {"size": 11, "chunk_bytes": 4 * V * 7},
        {"size": 3, "chunk_bytes": 1},
    ):
        found = measure(student, rows, teacher=teacher, **options, **other).metrics()
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            assert found[name] == pytest.approx(value, rel=1e-11, abs=1e-14), (name, other)


def test_in_float32_batches_and_packing_change_no_more_than_rounding(tiny_student: Path) -> None:
    model, rows = load(tiny_student, dtype=torch.float32), random_rows(3, 11, draws=D)
    whole = measure(model, rows, size=11, draws=D).metrics()
    for other in ({"size": 1}, {"size": 5}, {"size": 4, "pack": True}):
        found = measure(model, rows, draws=D, **other).metrics()
        for name in whole.keys() - {"expected_calibration_error"}:
            assert found[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), (name, other)


def test_the_dense_divergences_are_their_definitions(student: Any, teacher: Any) -> None:
    rows = random_rows(4, 6)
    found = measure(student, rows, teacher=teacher)
    values = []
    for row, _ in rows:
        for p, q in zip(student_probs(teacher, row), student_probs(student, row), strict=True):
            last = reference.last_fifth(p)
            values.append([reference.kl(p, q), reference.kl(q, p), reference.mass(q, last), reference.mass(p, last)])
    wanted = np.mean(values, axis=0)
    got = [found.forward_kl, found.reverse_kl, found.last_fifth_mass, found.teacher_last_fifth_mass]
    np.testing.assert_allclose(np.array(got, float), wanted, rtol=1e-10)


@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_the_lower_bounds_lie_below_the_dense_divergences_and_meet_them_where_all_is_kept(
    student: Any, teacher: Any, top_k: int
) -> None:
    rows = taught_by(teacher, random_rows(5, 5), top_k=top_k)
    found = measure(student, rows, teacher=teacher)
    assert 0 < found.forward_kl_lower_bound < found.forward_kl
    assert 0 < found.reverse_kl_lower_bound < found.reverse_kl
    whole = measure(student, taught_by(teacher, rows, top_k=V), teacher=teacher)
    assert whole.forward_kl_lower_bound == pytest.approx(whole.forward_kl, rel=1e-5)
    assert whole.reverse_kl_lower_bound == pytest.approx(whole.reverse_kl, rel=1e-5)
    assert whole.tail_mass == pytest.approx(0, abs=1e-20)


def taught_by(model: Any, rows: list[Row], *, top_k: int, draws: int = 0) -> list[Row]:
    """The same tokens, with the predictions of `model` cached."""
    made = []
    for n, (row, _) in enumerate(rows):
        probs = student_probs(model.eval(), row)
        targets = making.targets_of(probs, row.labels, top_k=top_k, draws=draws, seed=n, draw_logprobs=draws > 0)
        made.append((replace(row, targets=targets), probs))
    return made


def test_a_cache_of_the_resident_teacher_is_near_it_and_that_of_another_is_not(student: Any, teacher: Any) -> None:
    rows = random_rows(6, 5)
    own = measure(student, taught_by(teacher, rows, top_k=8), teacher=teacher)
    assert own.cached_teacher_kl == pytest.approx(0, abs=1e-9)
    assert measure(student, rows, teacher=teacher).cached_teacher_kl > 0.1


def test_a_student_that_is_its_teacher_has_no_divergence(teacher: Any) -> None:
    rows = taught_by(teacher, random_rows(7, 5), top_k=8, draws=D)
    found = measure(teacher, rows, teacher=teacher, draws=D)
    assert found.top1_agreement == 1
    for name in ("forward_kl", "reverse_kl", "forward_kl_lower_bound", "reverse_kl_lower_bound", "tail_kl_estimate"):
        assert getattr(found, name) == pytest.approx(0, abs=1e-7)
    assert found.cross_entropy == pytest.approx(found.teacher_cross_entropy, abs=1e-6)


def test_with_many_draws_the_estimates_come_near_the_dense_values(student: Any, teacher: Any) -> None:
    rows = taught_by(teacher, random_rows(8, 12), top_k=8, draws=400)
    found = measure(student, rows, teacher=teacher, draws=400)
    assert found.forward_kl_lower_bound < 0.6 * found.forward_kl
    assert found.forward_kl_estimate == pytest.approx(found.forward_kl, abs=4 * found.forward_kl_estimate_error)
    assert found.forward_kl_estimate == pytest.approx(found.forward_kl, rel=0.03)
    entropy = np.mean([reference.soft_cross_entropy(p, p) for _, probs in rows for p in probs])
    assert found.soft_cross_entropy_estimate - entropy == pytest.approx(found.forward_kl, rel=0.03)


def test_estimates_are_given_only_where_they_can_be_made(student: Any) -> None:
    with_draws = [row for row, _ in random_rows(9, 3, draws=D)]
    batch = padded(with_draws)
    assert evaluate_student(student, [batch], token_count=V).forward_kl_estimate is None
    assert evaluate_student(student, [batch], token_count=V, draws=D).forward_kl_estimate is not None
    batch["targets"] = replace(batch["targets"], draw_logprobs=None)
    blind = evaluate_student(student, [batch], token_count=V, draws=D)
    assert blind.forward_kl_estimate is None
    assert blind.forward_kl_estimate_error is None
    assert blind.soft_cross_entropy_estimate is not None


def test_streams_of_a_dataset_give_the_numbers_of_its_rows(student: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    dataset = load_logit_dataset(tiny_dataset, cache_dir=tmp_path / "cache")
    rows = list(open_dataset(tiny_dataset).rows())
    options = {"token_count": V, "draws": draws_per_position(dataset)}
    wanted = evaluate_student(student, batches_of(rows, 7), **options).metrics()
    assert wanted["targets"] == dataset.targets
    for shape in ({"batch_size": 1}, {"batch_size": 5}, {"batch_size": 1, "pack_length": 40}):
        stream = dataset.stream(seed=0, epochs=1, shuffle=False, **shape)
        found = evaluate_student(student, stream, **options).metrics()
        # Weights of draws are float32 in a stream.
        assert found == pytest.approx(wanted, rel=1e-6), shape


def test_a_figure_that_a_batch_lacks_is_none(student: Any) -> None:
    known, blind = (padded([row for row, _ in random_rows(seed, 3, draws=D)]) for seed in (17, 18))
    blind["targets"] = replace(blind["targets"], draw_logprobs=None)
    found = evaluate_student(student, [known, blind], token_count=V, draws=D)
    assert found.forward_kl_estimate is None
    assert found.tail_kl_estimate is None
    assert found.soft_cross_entropy_estimate is not None


def test_a_padded_head_changes_nothing(tiny_student: Path) -> None:
    rows = random_rows(10, 4)
    narrow, wide = load(tiny_student), load(tiny_student)
    wide.resize_token_embeddings(V + 16)
    with torch.no_grad():
        wide.get_output_embeddings().weight[V:] = 7
    assert measure(wide, rows).metrics() == pytest.approx(measure(narrow, rows).metrics(), rel=1e-12)


def test_every_part_of_the_model_has_its_own_mode_again(tiny_student: Path) -> None:
    model = load(tiny_student).train()
    model.model.layers[0].eval()
    before = [part.training for part in model.modules()]
    measure(model, random_rows(11, 2))
    assert [part.training for part in model.modules()] == before
    with pytest.raises(NoTargets):
        measure(model, [])
    assert [part.training for part in model.modules()] == before
    assert torch.is_grad_enabled()


def test_dropout_is_off(tmp_path: Path) -> None:
    model = load(making.tiny_llama(tmp_path, attention_dropout=0.5)).train()
    rows = random_rows(12, 3)
    assert measure(model, rows).metrics() == measure(model, rows).metrics()


def test_processes_add_up_their_sums(student: Any) -> None:
    rows = random_rows(13, 6, draws=D)
    kept: list[torch.Tensor] = []

    def keep(sums: torch.Tensor) -> torch.Tensor:
        kept.append(sums)
        return sums

    measure(student, rows[:4], draws=D, reduce=keep)
    together = measure(student, rows[4:], draws=D, reduce=lambda sums: sums + kept[0])
    assert together.metrics() == pytest.approx(measure(student, rows, draws=D).metrics(), rel=1e-12)


def test_a_process_without_a_batch_of_its_own_takes_part(student: Any) -> None:
    rows = random_rows(14, 3, draws=D)
    kept: list[torch.Tensor] = []
    whole = measure(student, rows, draws=D, reduce=lambda sums: kept.append(sums) or sums)
    assert measure(student, [], draws=D, reduce=lambda sums: sums + kept[0]) == whole


def test_no_target_position_is_an_error(student: Any) -> None:
    with pytest.raises(NoTargets):
        evaluate_student(student, [], token_count=V)


@pytest.mark.parametrize("make", [padded, packed])
def test_logits_that_are_not_finite_name_the_model_and_the_rows(tiny_student: Path, student: Any, make: Any) -> None:
    rows = [row for row, _ in random_rows(15, 4)]
    broken = load(tiny_student)
    token = int(rows[2].token_ids[0])
    sick = [row.sample_id for row in rows if token in row.token_ids[:-1]]
    with torch.no_grad():
        broken.get_input_embeddings().weight[token] = torch.nan
    with pytest.raises(NonFiniteLogits, match=f"the student in rows .*{sick[0]}"):
        evaluate_student(broken, [make(rows)], token_count=V)
    with pytest.raises(NonFiniteLogits, match=f"the resident teacher in rows .*{sick[0]}"):
        evaluate_student(student, [make(rows)], token_count=V, teacher=broken)


def test_the_bins_of_the_calibration_error_add_up(student: Any) -> None:
    found = measure(student, random_rows(16, 6))
    assert len(found.calibration) == 15
    assert sum(one.targets for one in found.calibration) == found.targets
    error = sum(one.targets * abs(one.accuracy - one.confidence) for one in found.calibration if one.targets)
    assert found.expected_calibration_error == pytest.approx(error / found.targets)
    assert all(one.above < one.confidence <= one.up_to for one in found.calibration if one.targets)


def test_a_resident_teacher_is_not_compared_with_one_that_saw_another_prompt(student: Any) -> None:
    dataset = Path(__file__).parents[2] / "storage_schema/golden/format_v2/all_fields"
    with pytest.raises(TeacherSawAnotherPrompt, match="system"):
        evaluate_on_dataset(student, dataset, teacher=student)
