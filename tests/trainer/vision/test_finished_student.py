"""The finished student that sees images: answers, frozen parts, adapters, precisions, the best checkpoint."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from coldstill import load_logit_dataset
from coldstill.storage_schema.dataset import open_dataset
from coldstill.trainer.errors import StudentDiffers
from coldstill.trainer.evaluation.evaluate import evaluate_on_dataset
from coldstill.trainer.evaluation.measured_model import load_measured
from coldstill.trainer.finished_student import TrainedLogits
from coldstill.trainer.student.images import images_of
from coldstill.trainer.train import train
from tests import vision
from tests.trainer.training import build, weights_of

from .students import config_of, loaded


def answer(student: Path, dataset: Path, *, model: Any = None) -> torch.Tensor:
    """The finished student's tokens after a question about an image, by transformers alone."""
    model = model or AutoModelForImageTextToText.from_pretrained(student)
    processor = AutoProcessor.from_pretrained(student)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    shown = Image.open(io.BytesIO(vision.image_bytes(3))).convert("RGB")
    inputs = processor(text=[text], images=[[shown]], return_tensors="pt", add_special_tokens=False)
    grown = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return grown[0, inputs["input_ids"].shape[1] :]


def test_the_finished_student_answers_by_transformers_alone_and_frozen_parts_are_as_before(
    folder: Path, dataset: Path, tmp_path: Path
) -> None:
    config = config_of(dataset, folder, tmp_path / "run", student={"freeze": ["vision_tower", "projector"]})
    train(config)
    student = tmp_path / "run/student"
    assert answer(student, dataset).numel()
    before, after = (loaded(path).state_dict() for path in (folder, student))
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    parts = ("vision_tower", "vision_model", "multi_modal_projector", "connector")
    assert moved == {name for name in after if not any(part in name for part in parts)}
    card = ModelCard.load(student / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    theirs, ours = (AutoProcessor.from_pretrained(path) for path in (folder, student))
    assert theirs.to_dict() == ours.to_dict()
    assert theirs.chat_template == ours.chat_template
    assert train(config).steps == 3  # the stored summary


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_are_in_the_language_model_alone(folder: Path, dataset: Path, tmp_path: Path, merge: bool) -> None:
    lora = {"lora": {"r": 4, "alpha": 8, "merge": merge}}
    config = config_of(dataset, folder, tmp_path / "run", student=lora)
    train(config)
    student = tmp_path / "run/student"
    base = loaded(folder)
    if merge:
        before, after = base.state_dict(), loaded(student).state_dict()
        moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
        assert moved
        assert all("language_model" in name or "text_model" in name for name in moved)
        assert answer(student, dataset).numel()
    else:
        adapted = PeftModel.from_pretrained(base, student)
        names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
        assert names
        assert all("language_model" in name or "text_model" in name for name in names)
        assert answer(student, dataset, model=adapted).numel()
    measured = load_measured(str(student), open_dataset(dataset), role="the student")
    assert evaluate_on_dataset(measured, dataset).targets == load_logit_dataset(dataset).targets


def test_a_student_whose_processor_is_not_that_of_the_training_differs(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    import coldstill.trainer.finished_student as finished

    folder = vision.idefics3_model(tmp_path / "model", splits=True)
    other = vision.idefics3_model(tmp_path / "other", splits=False)
    files = {"processor_config.json": (other / "processor_config.json").read_bytes()}
    assert json.loads(files["processor_config.json"])
    with monkeypatch.context() as patch:
        patch.setattr(finished, "processor_files", lambda student: files)
        with pytest.raises(StudentDiffers, match="tokens with its text"):
            train(config_of(dataset, folder, tmp_path / "run"))
    assert train(config_of(dataset, folder, tmp_path / "run")).steps == 3


def test_the_logits_of_a_checkpoint_are_of_a_row_with_an_image(folder: Path, dataset: Path, tmp_path: Path) -> None:
    trainer, _ = build(dataset, loaded(folder), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trained = TrainedLogits.read(tmp_path / "checkpoint-1")
    processor = AutoProcessor.from_pretrained(folder)
    assert int((trained.tokens == processor.image_token_id).sum()) >= 4
    with torch.no_grad():
        text = trainer.model.eval()(input_ids=trained.tokens[None]).logits[0, -trained.logits.shape[0] :]
    assert (text - trained.logits).abs().max() > 1e-4


def test_the_best_checkpoint_is_loaded_whatever_names_its_weights_have(
    folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """LLaVA's weights are saved under other names than they have in memory."""
    training = {"eval_steps": 1, "best_metric": "eval_teacher_cross_entropy", "max_steps": 2}  # never improves
    config = config_of(dataset, folder, tmp_path / "run", training=training, eval_dataset=str(dataset))
    best = Best()
    summary = train(config, callbacks=[best])
    assert (summary.student_step, summary.steps) == (1, 2)
    student = loaded(tmp_path / "run/student").state_dict()
    for name, weight in best.weights[1].items():
        assert torch.equal(student[name], weight), name
        assert name not in best.at_end or torch.equal(best.at_end[name], weight), name


class Best(TrainerCallback):
    """Records the weights after each step, and those of the trainer's model after `load_best_model_at_end`."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        self.weights[state.global_step] = weights_of(model)

    def on_train_end(self, args, state, control, model=None, **_) -> None:
        self.at_end = weights_of(model)


@pytest.mark.parametrize(
    "student",
    [
        {"dtype": "bfloat16"},
        pytest.param({"dtype": "bfloat16", "weights": "bfloat16"}, marks=pytest.mark.slow),
        {"weights": "bfloat16", "lora": {"r": 4, "merge": True}},
        {"from_scratch": ""},
    ],
    ids=["autocast", "bfloat16", "bfloat16 merged", "from scratch"],
)
def test_other_precisions_and_a_student_from_scratch_are_trained_and_load_again(
    folder: Path, dataset: Path, tmp_path: Path, student: dict[str, Any]
) -> None:
    """`train` itself compares the finished student with the trained one, on a row with an image."""
    if "from_scratch" in student:
        student = {"model": None, "from_scratch": str(folder)}
    train(config_of(dataset, folder, tmp_path / "run", student=student, training={"dataloader_workers": 1}))
    measured = load_measured(str(tmp_path / "run/student"), open_dataset(dataset), role="the student")
    assert images_of(measured) is not None
