"""A local task of lm-eval on a local model: the accuracy it finds is the one found by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from coldstill.common.packages import PackagesMissing
from coldstill.trainer.errors import TaskFailed
from coldstill.trainer.evaluation.lm_eval_tasks import evaluate_tasks
from tests import making
from tests.trainer.evaluation.batches import load

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A task file, and its questions: strings of the tiny tokenizer's signs."""
    rng = np.random.default_rng(0)

    def word() -> str:
        return "".join(chr(ord("!") + n) for n in rng.integers(0, 60, int(rng.integers(2, 6))))

    questions: list[Any] = [
        {"question": word(), "choices": [word(), word(), word()], "answer": int(rng.integers(3))} for _ in range(12)
    ]
    file = making.write_jsonl(folder / "questions.jsonl", questions)
    task = folder / "tiny_choice.yaml"
    task.write_text(TASK.format(file=json.dumps(str(file))))
    return task, questions


def by_hand(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> float:
    """How often the most probable choice is the answer."""
    right = 0
    for asked in questions:
        scores = []
        for choice in asked["choices"]:
            prompt, whole = (
                tokenizer(asked["question"])["input_ids"],
                tokenizer(asked["question"] + choice)["input_ids"],
            )
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[n - 1, whole[n]]) for n in range(len(prompt), len(whole))))
        right += int(np.argmax(scores)) == asked["answer"]
    return right / len(questions)


@pytest.mark.slow
def test_a_local_task_runs_without_a_network(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason='needs the extra: pip install "coldstill[eval]"')
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    task, questions = write_task(tmp_path)
    model, tokenizer = load(tiny_student, dtype=torch.float32).train(), AutoTokenizer.from_pretrained(tiny_student)
    wanted = by_hand(model, tokenizer, questions)
    found = evaluate_tasks(model, tokenizer, [str(task)], batch_size=4)
    assert found == {"tiny_choice/acc": pytest.approx(wanted)}
    assert model.training
    with pytest.raises(TaskFailed, match="no_such_task"):
        evaluate_tasks(model, tokenizer, ["no_such_task"], batch_size=4)
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(TaskFailed, match=r"broken\.yaml"):
        evaluate_tasks(model, tokenizer, [str(tmp_path / "broken.yaml")], batch_size=4)


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PackagesMissing, match=r'pip install "coldstill\[eval\]"'):
        evaluate_tasks(None, None, ["hellaswag"], batch_size=1)
