"""The report and the model card of a run, for long, short and empty logs."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from coldstill.trainer.finished_student import MOST_ROWS, model_card, run_report
from coldstill.trainer.losses import read_loss
from tests import making


def test_the_report_shows_the_curve_of_t_and_samples_a_long_log():
    log = [{"step": n, "loss": 1.0, "taid_t": n / 999, "taid_momentum": 0.0, "bucket_kl": 2.0} for n in range(1000)]
    text = run_report(log)
    assert "t from 0.000 to 1.000" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == MOST_ROWS + 1
    assert lines[1].startswith("| 0 ")
    assert lines[-1].startswith("| 999 ")


def test_the_report_of_a_loss_without_t_has_none_and_shows_measurements():
    text = run_report([{"step": 1, "loss": 1.0}, {"step": 1, "eval_loss": 0.5, "eval_accuracy": 0.25}])
    assert "taid_t" not in text
    assert "| 1 | 0.5 | 0.25 |" in text


def test_an_empty_log_has_a_report():
    assert run_report([]).startswith("# ")


def test_the_hub_can_read_the_card_and_it_hides_local_folders(tiny_student: Path):
    text = model_card(
        student=str(tiny_student),
        headers=[making.tiny_header(tiny_student)],
        dataset_ids=["a" * 64],
        loss=read_loss("taid"),
        record={"targets": 1234567, "schedule": {"t": 0.9}},
        steps=12,
        adapters=False,
        recipe={"training": {"epochs": 2}},
    )
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert "taid" in card.data.tags
    for fact in ("a" * 64, "1,234,567", "0.9000", "CC0-1.0", "epochs: 2"):
        assert fact in text
    assert str(tiny_student) not in text


def test_the_card_of_a_hub_student_names_it_for_the_hub():
    text = model_card(
        student="Qwen/Qwen2.5-0.5B",
        headers=[],
        dataset_ids=[],
        loss=read_loss("cross_entropy"),
        record={"targets": 1, "schedule": None},
        steps=1,
        adapters=True,
    )
    data = ModelCard(text).data
    assert (data.base_model, data.library_name) == ("Qwen/Qwen2.5-0.5B", "peft")
    assert "final t" not in text
