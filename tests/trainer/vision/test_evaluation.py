"""Evaluation of students that see images: a plain computation, records of tokens, answers."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from coldstill import load_logit_dataset
from coldstill.storage_schema.dataset import open_dataset
from coldstill.trainer.evaluation import rouge
from coldstill.trainer.evaluation.evaluate import batches_of, evaluate_on_dataset
from coldstill.trainer.evaluation.measured_model import load_measured
from coldstill.trainer.evaluation.token_records import token_records
from coldstill.trainer.student.forward import model_inputs
from coldstill.trainer.student.images import images_of
from tests import making, vision

from .students import content, loaded, own_logits


def plain_cross_entropy(folder: Path, dataset: Path) -> float:
    model, total, count = loaded(folder).eval(), 0.0, 0
    with torch.no_grad():
        for row in open_dataset(dataset).rows():
            logs = own_logits(model, folder, row, dataset).double().log_softmax(-1)
            labels = torch.from_numpy(row.labels.astype(np.int64))
            total -= float(logs.gather(1, labels[:, None]).sum())
            count += len(labels)
    return total / count


def test_evaluation_is_a_plain_computation_for_a_student_and_a_teacher_of_another_family(
    folder: Path, llava: Path, dataset: Path
) -> None:
    opened = open_dataset(dataset)
    student = load_measured(str(folder), opened, role="the student")
    teacher = load_measured(str(llava), opened, role="the teacher")
    report = evaluate_on_dataset(student, dataset, teacher=teacher, batch_size=3, tokenizers_are_checked=True)
    assert report.cross_entropy == pytest.approx(plain_cross_entropy(folder, dataset), rel=1e-5)
    total, count = 0.0, 0
    models = loaded(folder).eval(), loaded(llava).eval()
    with torch.no_grad():
        for row in opened.rows():
            q, p = (
                own_logits(model, path, row, dataset).double().log_softmax(-1)
                for model, path in zip(models, (folder, llava), strict=True)
            )
            total += float((p.exp() * (p - q)).sum())
            count += row.positions.size
    assert report.forward_kl == pytest.approx(total / count, rel=1e-3)


def test_records_of_tokens_have_the_stored_positions(llava: Path, dataset: Path) -> None:
    model = load_measured(str(llava), open_dataset(dataset), role="the student")
    batches = batches_of(load_logit_dataset(dataset), model, batch_size=3)
    records = list(token_records(model, batches, token_count=len(vision.vision_tokenizer()), text=str))
    wanted = [(row.sample_id, at) for row in open_dataset(dataset).rows() for at in row.positions.tolist()]
    assert [(record.sample_id, record.position) for record in records] == wanted


def test_the_model_object_and_its_copy_keep_their_way_of_reading(llava: Path, dataset: Path) -> None:
    model = load_measured(str(llava), open_dataset(dataset), role="the student")
    images = images_of(copy.deepcopy(model))
    batch = next(iter(load_logit_dataset(dataset).stream(batch_size=2, seed=0, images=images)))
    assert set(model_inputs(batch, model)) == {"input_ids", "attention_mask", "pixel_values"}
    assert len(vision.vision_tokenizer()) > making.VOCABULARY


def test_greedy_answers_about_images_are_those_of_each_prompt_alone(folder: Path, dataset: Path) -> None:
    opened = open_dataset(dataset)
    model = load_measured(str(folder), opened, role="the student")
    processor = AutoProcessor.from_pretrained(folder)
    asked = rouge.questions(opened, limit=9)
    read = rouge._reader_of_prompts(model, opened)
    found = list(rouge.greedy_answers(model, asked, pad_id=1, batch_size=3, max_new_tokens=6, read=read))
    for row, question, answer_ids in zip(opened.rows(), asked, found, strict=True):
        shown = [Image.open(io.BytesIO(content(dataset, item))).convert("RGB") for item in row.media]
        text = processor.tokenizer.decode(question.prompt)
        inputs = processor(
            text=[text], images=[shown] if shown else None, return_tensors="pt", add_special_tokens=False
        )
        given = inputs["input_ids"].shape[1]
        alone = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=1)[0, given:].tolist()
        assert answer_ids[: len(alone)] == alone
    without = rouge.questions(opened, limit=9, without_images=True)
    assert [one.sample_id for one in without] == [row.sample_id for row in opened.rows() if not row.media]
