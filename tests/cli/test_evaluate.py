"""What `coldstill evaluate` does with its names and options."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from coldstill.cli.evaluate import evaluate
from coldstill.common.packages import PackagesMissing
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import TokenizerMismatch
from coldstill.trainer.errors import StudentHeadTooSmall, StudentNotFound
from coldstill.trainer.evaluation.evaluate import evaluate_student
from coldstill.trainer.evaluation.report import EvaluationReport
from tests import making
from tests.trainer.evaluation.batches import batches_of, load


@pytest.fixture(autouse=True)
def cache_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDSTILL_CACHE", str(tmp_path / "cache"))


def test_the_document_holds_the_metrics_and_the_bins(
    tiny_dataset: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(str(tiny_student), str(tiny_dataset), as_json=True)
    found = json.loads(capsys.readouterr().out)
    dataset = open_dataset(tiny_dataset)
    assert (found.pop("student"), found.pop("dataset_id")) == (str(tiny_student), dataset.dataset_id)
    assert found.pop("teacher") == "tiny"
    assert found["targets"] == dataset.manifest.targets
    report = EvaluationReport.model_validate(found)
    model = load(tiny_student, dtype=torch.float32)
    wanted = evaluate_student(model, batches_of(list(dataset.rows()), 5), token_count=making.VOCABULARY, draws=4)
    assert report.soft_cross_entropy_estimate is not None
    assert report.forward_kl_estimate is None
    assert report.metrics() == pytest.approx(wanted.metrics(), rel=1e-5)


def test_the_table_names_every_metric_and_a_resident_teacher_adds_the_dense_ones(
    tiny_dataset: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(str(tiny_student), str(tiny_dataset), teacher=str(tiny_student), batch_size=3)
    shown, said = capsys.readouterr()
    assert "the resident teacher is not the dataset's teacher" in said
    for name in ("cross entropy", "forward kl lower bound", "forward kl", "reverse kl", "head mass", "last fifth mass"):
        assert f" {name} " in shown
    assert "calibration " not in shown.replace("expected calibration error", "")


def test_rows_are_shown_token_by_token_or_written(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(open_dataset(tiny_dataset).rows())[:2]
    evaluate(str(tiny_student), str(tiny_dataset), per_token=2)
    shown = capsys.readouterr().out
    assert rows[0].sample_id in shown
    assert rows[1].sample_id in shown
    evaluate(str(tiny_student), str(tiny_dataset), per_token=2, records=tmp_path / "tokens.jsonl", as_json=True)
    json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert len(lines) == sum(row.positions.size for row in rows)
    assert [line["label"] for line in lines[: rows[0].positions.size]] == rows[0].labels.tolist()


def test_a_folder_that_is_not_there_is_no_hub_name(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "student").symlink_to(tiny_student)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudentNotFound, match=r"no such folder(.|\n)*did you mean runs/student\?"):
        evaluate("runs/studnet", str(tiny_dataset))
    with pytest.raises(StudentNotFound, match=r"no such folder(.|\n)*check the path"):
        evaluate("runs/first/student", str(tiny_dataset))


def test_errors_say_which_of_the_models_it_is(tiny_dataset: Path, tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(StudentNotFound, match="student: "):
        evaluate(str(tmp_path / "nowhere"), str(tiny_dataset))
    with pytest.raises(StudentNotFound, match="resident teacher: "):
        evaluate(str(tiny_student), str(tiny_dataset), teacher=str(tmp_path / "nowhere"))
    other = making.chat_model(tmp_path / "other")
    with pytest.raises(TokenizerMismatch, match="resident teacher: "):
        evaluate(str(tiny_student), str(tiny_dataset), teacher=str(other))
    narrow = making.tiny_llama(tmp_path / "narrow", vocabulary=40)
    making.tiny_tokenizer(narrow)
    with pytest.raises(StudentHeadTooSmall, match="student: "):
        evaluate(str(narrow), str(tiny_dataset))


@pytest.mark.parametrize(("option", "package"), [({"rouge": 2}, "rouge_score"), ({"tasks": ["x"]}, "lm_eval")])
def test_missing_packages_are_said_before_anything_is_loaded(
    option: dict, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PackagesMissing, match=package):
        evaluate("nowhere", "nowhere", **option)
