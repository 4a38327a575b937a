"""Records of single tokens: their numbers, JSON lines, and strangers' text that cannot act on a terminal."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from coldstill.cli.evaluate import show_records
from coldstill.storage_schema.dataset import open_dataset
from coldstill.tools.inspect.token_text import TokenText
from coldstill.trainer.evaluation.evaluate import evaluate_student
from coldstill.trainer.evaluation.token_records import TokenRecord, token_records, write_records
from tests import making
from tests.trainer.evaluation import reference
from tests.trainer.evaluation.batches import batches_of, load, packed, random_rows, student_probs

V = making.VOCABULARY


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> Any:
    return load(tiny_student)


def name_of(token: int) -> str:
    return f"<{token}>"


def records_of(student: Any, rows: list, **options: Any) -> list[TokenRecord]:
    batches = options.pop("batches", None) or batches_of([row for row, _ in rows], 2)
    return list(token_records(student, batches, token_count=V, text=name_of, **options))


def test_each_record_has_the_start_of_a_long_sample_id_only(student: Any) -> None:
    row, teacher = random_rows(1, 3, top_k=6)[0]
    for record in records_of(student, [(dataclasses.replace(row, sample_id="x" * 100_000), teacher)]):
        assert record.sample_id == "x" * 200


def test_each_record_is_its_position(student: Any) -> None:
    rows = random_rows(1, 3, top_k=6)
    expected = []
    for row, teacher in rows:
        for n, (p, q) in enumerate(zip(teacher, student_probs(student, row), strict=True)):
            expected.append((row, n, p, q))
    found = records_of(student, rows)
    assert len(found) == len(expected)
    for record, (row, n, p, q) in zip(found, expected, strict=True):
        label, kept = int(row.labels[n]), row.targets.ids[n].tolist()
        assert (record.sample_id, record.position, record.label) == (row.sample_id, row.positions[n], label)
        assert record.text == name_of(label)
        assert record.student_prob == pytest.approx(q[label])
        assert record.teacher_prob == pytest.approx(p[label], rel=1e-5)
        assert [choice.id for choice in record.student_top] == reference.ranked(q)[:5]
        assert [choice.prob for choice in record.student_top] == pytest.approx(sorted(q)[::-1][:5])
        assert [choice.id for choice in record.teacher_top] == reference.ranked(p)[:5]
        assert record.teacher_top[0].text == name_of(record.teacher_top[0].id)
        bound = reference.kl(reference.bucket(p, kept), reference.bucket(q, kept))
        assert record.forward_kl_lower_bound == pytest.approx(bound, rel=1e-5)
        assert record.teacher_tail == pytest.approx(1 - p[kept].sum(), rel=1e-4)
        assert record.forward_kl is None


def test_their_mean_is_the_report_and_packs_change_nothing(student: Any) -> None:
    rows = random_rows(2, 3)
    report = evaluate_student(student, batches_of([row for row, _ in rows], 3), token_count=V, teacher=student)
    found = records_of(student, rows, teacher=student)
    assert np.mean([r.forward_kl_lower_bound for r in found]) == pytest.approx(report.forward_kl_lower_bound)
    assert [record.forward_kl for record in found] == pytest.approx([0] * len(found), abs=1e-12)
    together = records_of(student, rows, teacher=student, batches=[packed([row for row, _ in rows])])
    assert [(r.sample_id, r.position, r.label) for r in together] == [(r.sample_id, r.position, r.label) for r in found]
    for one, other in zip(together, found, strict=True):
        assert one.forward_kl_lower_bound == pytest.approx(other.forward_kl_lower_bound)


def test_unused_entries_are_no_choices(student: Any) -> None:
    rows = random_rows(3, 2, top_k=8, min_prob=0.2)
    for record in records_of(student, rows):
        assert 1 <= len(record.teacher_top) <= 5
        assert all(choice.prob > 0.19 for choice in record.teacher_top[1:])


def test_a_file_has_a_json_document_per_line(student: Any, tmp_path: Path) -> None:
    found = records_of(student, random_rows(4, 2))
    path = tmp_path / "a new folder" / "tokens.jsonl"
    assert write_records(found, path) == len(found)
    lines = path.read_text().splitlines()
    assert [TokenRecord.model_validate(json.loads(line)) for line in lines] == found


def test_what_strangers_wrote_cannot_act_on_a_terminal(student: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    evil = "[b]\x1b\u202e\n"
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {evil if number == 5 else token: number for token, number in vocabulary.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = [making.random_row(np.random.default_rng(0), "\x1b[2Jrow\u202e", length=23)]
    making.write_dataset(tmp_path / "dataset", [rows], header=making.tiny_header(tmp_path), tokenizer=tmp_path)
    dataset = open_dataset(tmp_path / "dataset")
    text = TokenText(dataset).label
    found = list(token_records(student, batches_of(list(dataset.rows()), 1), token_count=V, text=text))
    assert any(choice.id == 5 for record in found for choice in (*record.student_top, *record.teacher_top))
    write_records(found, tmp_path / "tokens.jsonl")
    screen = StringIO()
    show_records(found, console=Console(file=screen, width=200, force_terminal=False))
    for shown in (screen.getvalue(), (tmp_path / "tokens.jsonl").read_text(encoding="utf-8")):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "[b]" in shown
        assert "\\u202e" in shown


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_table_fits_the_terminal(student: Any, width: int) -> None:
    found = records_of(student, random_rows(5, 2), teacher=student)
    screen = StringIO()
    show_records(found, console=Console(file=screen, width=width))
    lines = screen.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    assert sum("row-0" in line or "row-1" in line for line in lines) == 2
    assert ("✓" in screen.getvalue()) or width == 60
    assert "dense 0.000" in " ".join(screen.getvalue().split())
