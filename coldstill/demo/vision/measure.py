"""Measures teacher and students on held-out chats: their answers, and the KL to the teacher, by kind of question.

`python -m coldstill.demo.vision.measure OUTPUT [--quick]` writes `measurements.json` and `answers.json`. Answers are
greedy ones of transformers' `generate`, on what `AutoProcessor` makes of a chat: nothing of ours takes part. An answer
is right if it says what the scene shows, in either wording. The KL is over the whole vocabulary.

Shape letters: `B` rows of a batch, `M` target positions of a batch, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from coldstill.common.files import write_json
from coldstill.common.progress import tqdm
from coldstill.demo.models import parameter_count
from coldstill.demo.settings import LOSSES

from .scenes import KINDS, answer_content
from .settings import Layout

ROWS_PER_BATCH = 32
ANSWER_TOKENS = 20
"""The longest answer has 14 tokens and its end."""


class Model:
    """A trained model with its processor, as anyone would load them."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        self.network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def answers(self, rows: Sequence[dict[str, Any]], folder: Path) -> list[str]:
        """The greedy answer to each row's question."""
        prompts = [row["messages"][:1] for row in rows]
        inputs = self._inputs(prompts, rows, folder, padding_side="left", add_generation_prompt=True)
        made = self.network.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        return [self.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    def answer_logprobs(self, rows: Sequence[dict[str, Any]], folder: Path) -> list[torch.Tensor]:
        """`float32 [M, V]` of each row: log-probs of each token of its stored answer, its end included."""
        inputs = self._inputs([row["messages"] for row in rows], rows, folder, padding_side="right")
        logprobs = torch.log_softmax(self.network(**inputs).logits.float(), dim=-1)
        found = []
        for row, of_row, mask in zip(rows, logprobs, inputs["attention_mask"], strict=True):
            end = int(mask.sum())
            answer = self.processor.tokenizer(row["messages"][-1]["content"], add_special_tokens=False)["input_ids"]
            found.append(of_row[end - len(answer) - 2 : end - 1])
        return found

    def _inputs(
        self, chats: Sequence[Any], rows: Sequence[dict[str, Any]], folder: Path, *, padding_side: str, **template: Any
    ) -> Any:
        texts = [self.processor.apply_chat_template(chat, tokenize=False, **template) for chat in chats]
        images = [[Image.open(folder / path).convert("RGB") for path in row["images"]] for row in rows]
        shown = images if any(images) else None
        return self.processor(text=texts, images=shown, padding=True, padding_side=padding_side, return_tensors="pt")


def batches(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in batches whose rows all show the same number of images, which transformers needs."""
    for number in sorted({len(row["images"]) for row in rows}):
        same = [row for row in rows if len(row["images"]) == number]
        yield from (same[start : start + ROWS_PER_BATCH] for start in range(0, len(same), ROWS_PER_BATCH))


class Tally:
    """Right answers and KL of one model, by kind of question."""

    def __init__(self) -> None:
        self.questions: Counter[str] = Counter()
        self.right: Counter[str] = Counter()
        self.targets: Counter[str] = Counter()
        self.kl = dict.fromkeys(KINDS, 0.0)

    def add_answer(self, row: Mapping[str, Any], answer: str) -> None:
        """Count an answer."""
        self.questions[row["kind"]] += 1
        self.right[row["kind"]] += answer_content(answer) == row["content"]

    def add_kl(self, row: Mapping[str, Any], teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Add the positions of a row: `teacher` and `student float32 [M, V]` are log-probs."""
        self.targets[row["kind"]] += len(teacher)
        self.kl[row["kind"]] += (teacher.exp() * (teacher - student)).sum().double().item()

    def result(self) -> dict[str, Any]:
        """Accuracy and mean KL in nats per target, of all questions and by kind."""
        kinds = [kind for kind in KINDS if self.questions[kind]]
        return {
            "accuracy": sum(self.right.values()) / sum(self.questions.values()),
            "kl_teacher_student": sum(self.kl.values()) / max(1, sum(self.targets.values())),
            "accuracy_by_kind": {kind: self.right[kind] / self.questions[kind] for kind in kinds},
            "kl_by_kind": {kind: self.kl[kind] / max(1, self.targets[kind]) for kind in kinds},
        }


@torch.inference_mode()
def measure(layout: Layout) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `measurements.json` and `answers.json` hold."""
    from transformers.utils import logging

    logging.disable_progress_bar()

    folders = {"teacher": layout.teacher, "before": layout.student}
    models = {
        name: Model(folder)
        for name, folder in {**folders, **{loss: layout.run(loss) / "student" for loss in LOSSES}}.items()
    }
    with layout.chats("held_out").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    tallies = {name: Tally() for name in models}
    answers: dict[str, dict[str, str]] = {row["id"]: {} for row in rows}
    for batch in tqdm(list(batches(rows)), desc="measuring", unit="batch"):
        expected = models["teacher"].answer_logprobs(batch, layout.text)
        for name, model in models.items():
            found = expected if name == "teacher" else model.answer_logprobs(batch, layout.text)
            said = model.answers(batch, layout.text)
            for row, of_teacher, of_model, answer in zip(batch, expected, found, said, strict=True):
                tallies[name].add_kl(row, of_teacher, of_model)
                tallies[name].add_answer(row, answer)
                answers[row["id"]][name] = answer
    results = {
        name: {"parameters": parameter_count(model.network), **tallies[name].result()} for name, model in models.items()
    }
    teacher = results.pop("teacher")
    measured = {
        "questions": dict(tallies["teacher"].questions),
        "targets": sum(tallies["teacher"].targets.values()),
        "image_tokens": {name: models[name].processor.image_seq_len for name in ("teacher", "before")},
        "teacher": teacher,
        "students": results,
    }
    kept = ("id", "images", "kind", "content")
    shown = [
        {**{key: row[key] for key in kept}, "question": _question(row), "answers": answers[row["id"]]} for row in rows
    ]
    return measured, shown


def _question(row: Mapping[str, Any]) -> str:
    content = row["messages"][0]["content"]
    return content if isinstance(content, str) else str(content[-1]["text"])


def main() -> None:
    """Run the measurement and write its files."""
    arguments = argparse.ArgumentParser(description="Measure the vision demo's students against its teacher.")
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--quick", action="store_true")
    layout = Layout(arguments.parse_args().output)
    measured, answers = measure(layout)
    write_json(layout.answers, {"rows": answers})
    write_json(layout.measurements, measured)


if __name__ == "__main__":
    main()
