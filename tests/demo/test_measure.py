"""The measurement agrees with plain float64 sums over single rows."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from coldstill.demo.measure import StudentSums, TeacherSums, batches, target_logprobs
from coldstill.demo.models import new_model, train_tokenizer
from coldstill.demo.settings import MAX_TOKENS, Shape
from coldstill.demo.text import ModuleFile, pairs_of

from .test_text import SOURCE

VOCABULARY = 400


def test_batched_means_are_those_of_single_rows_in_float64() -> None:
    tokenizer = train_tokenizer([SOURCE], vocabulary=VOCABULARY)
    rows = list(pairs_of(ModuleFile(name="a.py", text=SOURCE)))
    rows.append(
        {"id": "long", "messages": [*rows[0]["messages"][:1], {"role": "assistant", "content": "x " * MAX_TOKENS}]}
    )
    teacher, student = (
        new_model(Shape(width=32, layers=1, heads=1, feed_forward=32, seed=seed), vocabulary=VOCABULARY).eval()
        for seed in (1, 2)
    )
    with torch.no_grad():
        student_sums, teacher_sums, targets = StudentSums(), TeacherSums(top_k=5), 0
        for tokens, loss_mask in batches(rows, tokenizer):
            labels = tokens[:, 1:][loss_mask[:, 1:]]
            wanted = target_logprobs(teacher, tokens, loss_mask)
            student_sums.add(wanted, target_logprobs(student, tokens, loss_mask), labels)
            teacher_sums.add(wanted, labels)
            targets += len(labels)
        expected = _slow(rows[:-1], tokenizer, teacher, student)
    assert targets == expected.pop("targets")
    found = {**student_sums.means(targets), "tail": teacher_sums.means(targets)["mass_outside_top_k"]}
    assert found == pytest.approx(expected, abs=1e-5)


def _slow(rows, tokenizer, teacher, student) -> dict[str, float]:
    kl = nats = agreed = tail = targets = 0.0
    for row in rows:
        encoded = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = encoded["input_ids"]
        p, q = (model(torch.tensor([ids])).logits[0].double().softmax(-1) for model in (teacher, student))
        for position, marked in enumerate(encoded["assistant_masks"]):
            if marked:
                before = position - 1
                kl += float((p[before] * (p[before] / q[before]).log()).sum())
                nats -= float(q[before, ids[position]].log())
                agreed += int(p[before].argmax()) == int(q[before].argmax())
                tail += 1 - float(p[before].sort(descending=True).values[:5].sum())
                targets += 1
    return {
        "kl_teacher_student": kl / targets,
        "cross_entropy": nats / targets,
        "top1_agreement": agreed / targets,
        "tail": tail / targets,
        "targets": targets,
    }
