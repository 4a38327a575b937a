"""The vision demo's measurement agrees with single rows in float64, and its summary has every promised key."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import torch
from PIL import Image
from rich.console import Console

from coldstill.common.files import read_json, write_json
from coldstill.demo.settings import LOSSES
from coldstill.demo.vision.measure import Model, measure
from coldstill.demo.vision.models import new_model, new_processor, train_tokenizer
from coldstill.demo.vision.scenes import write_part
from coldstill.demo.vision.settings import QUICK, Layout
from coldstill.demo.vision.summary import EXAMPLES, RUN_KEYS, examples, show, write_summary

from .test_models import TINY

ROWS = 24


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Held-out chats, and models with random weights, of which the teacher has another number of image tokens."""
    layout = Layout(tmp_path_factory.mktemp("demo") / "a demo")
    layout.text.mkdir(parents=True)
    write_part(layout.text, "held_out", seed=0, rows=ROWS, fonts=(), seen=set())
    folders = [layout.teacher, layout.student, *(layout.run(loss) / "student" for loss in LOSSES)]
    for seed, folder in enumerate(folders):
        tokenizer = train_tokenizer()
        shape = dataclasses.replace(TINY, seed=seed, merged=1 if folder == layout.teacher else 2)
        model = new_model(shape, tokenizer)
        with torch.no_grad():  # far from even, so that answers and KL differ between the models
            for parameter in model.parameters():
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(folder)
        new_processor(shape, tokenizer).save_pretrained(folder)
    return layout


@pytest.fixture(scope="module")
def measured(layout: Layout) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    measured, answers = measure(layout)
    write_json(layout.measurements, measured)
    write_json(layout.answers, {"rows": answers})
    return measured, answers


def held_out(layout: Layout) -> list[dict[str, Any]]:
    return [json.loads(line) for line in layout.chats("held_out").read_text().splitlines()]


@torch.inference_mode()
def test_batched_figures_are_those_of_single_rows(
    layout: Layout, measured: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    result, answers = measured
    teacher, student = Model(layout.teacher), Model(layout.run("taid") / "student")
    assert result["image_tokens"] == {"teacher": 16, "before": 4}
    kl: dict[str, list[float]] = {}
    for row, answered in zip(held_out(layout), answers, strict=True):
        p, q = (logprobs_of(model, row, layout) for model in (teacher, student))
        kl.setdefault(row["kind"], []).extend((p.exp() * (p - q)).sum(1).tolist())
        assert answered["answers"]["taid"] == answer_of(student, row, layout)
        assert answered["id"] == row["id"]
    figures = result["students"]["taid"]
    assert result["targets"] == sum(map(len, kl.values()))
    every = [value for values in kl.values() for value in values]
    assert figures["kl_teacher_student"] == pytest.approx(sum(every) / len(every), rel=1e-4)
    assert figures["kl_by_kind"] == pytest.approx({kind: sum(v) / len(v) for kind, v in kl.items()}, rel=1e-4)
    assert result["teacher"]["kl_teacher_student"] == 0


def test_an_answer_is_right_if_it_has_the_content_in_either_wording(layout: Layout) -> None:
    from coldstill.demo.vision.measure import Tally

    tally = Tally()
    for answer in ("it is red", "red", "green", "it is", ""):
        tally.add_answer({"kind": "color", "content": "red"}, answer)
    assert tally.result()["accuracy"] == tally.result()["accuracy_by_kind"]["color"] == 2 / 5


def logprobs_of(model: Model, row: dict[str, Any], layout: Layout) -> torch.Tensor:
    """`float64 [M, V]`: one row alone, without padding."""
    text = model.processor.apply_chat_template(row["messages"], tokenize=False)
    prompt = model.processor.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    images = [Image.open(layout.text / path) for path in row["images"]] or None
    inputs = model.processor(text=text, images=images, return_tensors="pt")
    start = model.processor(text=prompt, images=images, return_tensors="pt")["input_ids"].shape[1]
    return torch.log_softmax(model.network(**inputs).logits[0, start - 1 : -1].double(), dim=-1)


def answer_of(model: Model, row: dict[str, Any], layout: Layout) -> str:
    """The greedy answer, token by token, each from the whole row."""
    text = model.processor.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    images = [Image.open(layout.text / path) for path in row["images"]] or None
    inputs = dict(model.processor(text=text, images=images, return_tensors="pt"))
    new: list[int] = []
    while len(new) < 20:
        token = int(model.network(**inputs).logits[0, -1].argmax())
        if token == model.processor.tokenizer.eos_token_id:
            break
        new.append(token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model.processor.tokenizer.decode(new, skip_special_tokens=True)


@pytest.fixture(scope="module")
def summarized(layout: Layout, measured: Any) -> Layout:
    capture = {"rows": 9, "targets": 99, "rejected": 1, "tokens": 150, "bytes": 4000, "wall_s": 50.0}
    write_json(layout.capture_summary, {**capture, "tokens_per_s": 3000.0, "bytes_per_target": 40.4})
    for loss in LOSSES:
        write_json(layout.train_summary(loss), dict.fromkeys(RUN_KEYS, 1.0))
        write_json(layout.teacher_presence(loss), {"teacher_before": False, "teacher_after": False})
    write_summary(layout, QUICK)
    return layout


def test_the_summary_has_accuracy_and_kl_of_every_kind(summarized: Layout) -> None:
    summary = read_json(summarized.summary)
    assert set(summary["students"]) == set(LOSSES)
    kinds = {row["kind"] for row in held_out(summarized)}
    for row in (summary["teacher"], summary["student_before"], *summary["students"].values()):
        assert {"accuracy", "kl_teacher_student", "parameters"} <= set(row)
        assert set(row["accuracy_by_kind"]) == set(row["kl_by_kind"]) == kinds
    assert summary["teacher_folder_present_while_training"] is False


def test_the_picture_is_a_png_and_the_table_fits_80_columns(summarized: Layout) -> None:
    assert summarized.picture.read_bytes().startswith(b"\x89PNG")
    shown = io.StringIO()
    show(summarized, Console(file=shown, width=80), wall_s=61.0)
    text = shown.getvalue()
    for part in ("before", "TAID", "16 tokens", "4 tokens", "absent", "1:01 minutes", str(summarized.picture)):
        assert part in text
    assert "\u2026" not in text


def test_the_picture_shows_every_kind_with_an_image(summarized: Layout) -> None:
    answers = read_json(summarized.answers)["rows"]
    chosen = examples(answers)
    assert len(chosen) == min(EXAMPLES, sum(bool(row["images"]) for row in answers))
    assert {row["kind"] for row in chosen} == {row["kind"] for row in answers if row["images"]}
