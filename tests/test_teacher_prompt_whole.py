"""A system prompt that changes a teacher's answers is learned by a student that never sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coldstill.pipeline.prepare import prepare
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.manifest import seal
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.train import train
from tests import making
from tests.pipeline.capturing import capture_config, do_units

SYSTEM = "UPPER"


def _ids(tokenizer: Any, letter: str, *, system: bool, answer: str = "") -> list[int]:
    messages = [{"role": "system", "content": SYSTEM}] * system + [{"role": "user", "content": letter}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text + answer, add_special_tokens=False)["input_ids"])


def _train_teacher(folder: Path, steps: int = 400) -> None:
    """It repeats a letter; with the system prompt, it writes the capital one."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches = [
        torch.tensor(
            [_ids(tokenizer, x, system=system, answer=f"{x.upper() if system else x}</s>") for x in ascii_lowercase]
        )
        for system in (False, True)
    ]
    for _ in range(steps):
        losses = []
        for batch in batches:
            logits = model(batch[:, :-1]).logits[:, -2:]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, -2:].flatten()))
        loss = torch.stack(losses).mean()
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@torch.inference_mode()
def _answers(folder: Path, *, system: bool = False) -> Sequence[str]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = torch.tensor([_ids(tokenizer, letter, system=system) for letter in ascii_lowercase])
    return [tokenizer.decode(int(one)) for one in model(prompts).logits[:, -1].argmax(-1)]


def test_a_student_answers_without_the_system_prompt_as_its_teacher_does_with_it(tmp_path: Path) -> None:
    """The student begins as the teacher itself, which does not follow a prompt that it does not see."""
    teacher = making.chat_model(tmp_path / "teacher", seed=1)
    _train_teacher(teacher)
    lower, upper = list(ascii_lowercase), list(ascii_lowercase.upper())
    assert _answers(teacher) == lower
    assert _answers(teacher, system=True) == upper
    making.write_jsonl(tmp_path / "letters.jsonl", [{"id": letter, "prompt": letter} for letter in ascii_lowercase])
    config = capture_config(
        tmp_path,
        mode="generate",
        sampling={"temperature": 0, "max_tokens": 4},
        source={"path": str(tmp_path / "letters.jsonl"), "teacher_system": SYSTEM},
        calibration_targets=0,
    )
    store = prepare(config).store
    do_units(config)
    seal(store)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    for row, letter in zip(open_dataset(config.output).rows(), ascii_lowercase, strict=True):
        assert row.token_ids.tolist() == _ids(tokenizer, letter, system=False, answer=f"{letter.upper()}</s>")
    training = {"learning_rate": 3e-3, "batch_size": 13, "epochs": 40, "save_steps": 1000, "dataloader_workers": 0}
    student = {"model": str(teacher)}
    run = {"dataset": config.output, "output": str(tmp_path / "run"), "student": student, "training": training}
    train(TrainConfig.model_validate(run))
    assert _answers(tmp_path / "run" / "student") == upper
