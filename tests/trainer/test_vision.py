"""Students that see images: losses and gradients of a plain reference, freezing, adapters, resuming, the finished
student, evaluation. Two families with different patch counts train from one dataset."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM, TrainerCallback

from coldstill import load_logit_dataset
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.trainer.errors import CheckpointMismatch, PackingUnsupported, StudentDiffers, StudentSeesNoImages
from coldstill.trainer.evaluation import rouge
from coldstill.trainer.evaluation.evaluate import batches_of, evaluate_on_dataset
from coldstill.trainer.evaluation.measured_model import load_measured
from coldstill.trainer.evaluation.token_records import token_records
from coldstill.trainer.finished_student import TrainedLogits
from coldstill.trainer.student import images as student_images
from coldstill.trainer.student.forward import model_inputs
from coldstill.trainer.student.images import images_of
from coldstill.trainer.train import train
from tests import making, reference, vision
from tests.trainer.test_train import make_config
from tests.trainer.training import KillAt, Killed, Seen, build, weights_of

COUNTS = [1, 0, 2, 3, 0, 1, 2, 1]
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "idefics3": vision.idefics3_model,
    "idefics3 with tiles": lambda folder: vision.idefics3_model(folder, splits=True),
    "llava": vision.llava_model,
}
T = 0.4
"""t of the first step."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.llava_model(tmp_path_factory.mktemp("llava"), seed=4)


@pytest.fixture(scope="module")
def dataset(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = vision.vision_rows(llava, COUNTS, size=(70, 40))
    root = tmp_path_factory.mktemp("data") / "dataset"
    return vision.vision_dataset(root, [rows[:5], rows[5:]], tokenizer=llava, in_row_bytes=8500)


def loaded(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


def content(dataset: Path, item: Any) -> bytes:
    return item.data if item.data is not None else (dataset / item.path).read_bytes()


def own_logits(model: Any, folder: Path, row: CachedRow, dataset: Path) -> torch.Tensor:
    """`[N, V]` logits at a row's targets, by the processor's own output of the row's text. Answers are at the end."""
    processor = AutoProcessor.from_pretrained(folder)
    shown = [Image.open(io.BytesIO(content(dataset, item))).convert("RGB") for item in row.media]
    text = processor.tokenizer.decode(row.token_ids)
    inputs = processor(text=[text], images=[shown] if shown else None, return_tensors="pt", add_special_tokens=False)
    inputs = {name: value for name, value in inputs.items() if "offset" not in name}
    if not shown:
        assert inputs["input_ids"][0].tolist() == row.token_ids.tolist()
    logits = model(**inputs).logits[0]
    from_end = row.token_ids.size - row.positions
    return logits[logits.shape[0] - torch.from_numpy(from_end)]


def reference_loss(model: Any, folder: Path, dataset: Path) -> torch.Tensor:
    """The mean of -sum target log softmax(logits) whose gradient is TAID's: targets by `tests.reference` in float64.

    `reference.sparse_target` gives the target `[V]` of each position from what the cache holds of it.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in open_dataset(dataset).rows():
        logits = own_logits(model, folder, row, dataset).double()
        offsets = row.targets.draw_offsets
        for n in range(row.positions.size):
            kept = row.targets.counts[n]
            target = reference.sparse_target(
                logits[n].detach().numpy(),
                row.targets.ids[n, :kept].tolist(),
                row.targets.logprobs[n, :kept].astype(float).tolist(),
                float(row.targets.log_tail[n]),
                row.targets.draw_ids[offsets[n] : offsets[n + 1]].tolist(),
                t=T,
            )
            total = total - (torch.from_numpy(target) * logits[n].log_softmax(-1)).sum()
            count += 1
    return total / count


def test_gradients_are_those_of_a_plain_computation_row_by_row(folder: Path, dataset: Path, tmp_path: Path) -> None:
    """Rows with 0 to 3 images in one batch, against transformers' forward on each row's own text, and TAID by hand."""
    trainer, _ = build(dataset, loaded(folder), tmp_path, per_device_train_batch_size=8)
    (batch,) = load_logit_dataset(dataset).stream(batch_size=8, seed=0, epochs=1, images=trainer.images)
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch).backward()
    plain = loaded(folder).eval()
    reference_loss(plain, folder, dataset).backward()
    wanted = {name: weight.grad for name, weight in plain.named_parameters() if weight.grad is not None}
    found = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    assert found.keys() == wanted.keys()
    assert any("vision" in name for name in wanted)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5 * largest, msg=name)


def step(model: Any, dataset: Path, output: Path, **changes: Any) -> tuple[float, dict[str, torch.Tensor]]:
    trainer, _ = build(dataset, model, output, **changes)
    (batch,) = load_logit_dataset(dataset).stream(batch_size=8, seed=0, epochs=1, images=trainer.images)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: it.grad for name, it in trainer.model.named_parameters() if it.grad is not None}


@pytest.mark.parametrize("loss", ["taid", "cross_entropy", "reverse_kl"])
def test_the_fused_loss_is_that_of_the_model_s_own_logits(
    folder: Path, dataset: Path, tmp_path: Path, loss: str
) -> None:
    ours = step(loaded(folder), dataset, tmp_path / "a", loss=loss, fused_head=True)
    theirs = step(loaded(folder), dataset, tmp_path / "b", loss=loss, fused_head=False)
    trainer, _ = build(dataset, loaded(folder), tmp_path / "c")
    assert trainer.head.formula is not None
    same_steps(ours, theirs)


def same_steps(ours: tuple[float, dict[str, Any]], theirs: tuple[float, dict[str, Any]], rtol: float = 1e-4) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=rtol, atol=1e-5 * largest, msg=name)


def test_gradient_checkpointing_changes_nothing(folder: Path, dataset: Path, tmp_path: Path) -> None:
    plain, _ = build(dataset, loaded(folder), tmp_path / "a", num_train_epochs=2)
    plain.train()
    recomputed, _ = build(dataset, loaded(folder), tmp_path / "b", num_train_epochs=2, gradient_checkpointing=True)
    recomputed.train()
    for name, weight in recomputed.model.state_dict().items():
        torch.testing.assert_close(weight, plain.model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_batch_size_and_accumulation_do_not_change_the_gradient(folder: Path, dataset: Path, tmp_path: Path) -> None:
    steps = []
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer, gradients = build(
            dataset,
            loaded(folder),
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        steps.append(gradients.steps[0])
    for found in steps[1:]:
        torch.testing.assert_close(found, steps[0], rtol=1e-3, atol=1e-5 * float(steps[0].abs().max()))


def test_a_killed_run_resumes_bit_for_bit_and_workers_change_nothing(
    folder: Path, dataset: Path, tmp_path: Path
) -> None:
    shape = {"per_device_train_batch_size": 3, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    results = []
    for name, kill, workers in (("unbroken", None, 0), ("killed", 3, 0), ("workers", 2, 2)):
        output, seen = tmp_path / name, Seen()
        if kill is not None:
            trainer, _ = build(
                dataset, loaded(folder), output, callbacks=[KillAt(kill), seen], dataloader_num_workers=workers, **shape
            )
            seen.watch(trainer)
            with pytest.raises(Killed):
                trainer.train()
        trainer, _ = build(dataset, loaded(folder), output, callbacks=[seen], dataloader_num_workers=workers, **shape)
        seen.watch(trainer)
        trainer.train(resume_from_checkpoint=kill is not None)
        results.append((seen.rows, weights_of(trainer.model)))
    for rows, weights in results[1:]:
        assert rows == results[0][0]
        for name, weight in weights.items():
            assert torch.equal(weight, results[0][1][name]), name


def test_a_checkpoint_of_another_processor_is_a_named_error(dataset: Path, tmp_path: Path) -> None:
    shape = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    for splits in (False, True):
        folder = vision.idefics3_model(tmp_path / f"model {splits}", splits=splits)
        trainer, _ = build(dataset, loaded(folder), tmp_path / "run", **shape)
        if splits:
            with pytest.raises(CheckpointMismatch, match="processor_sha256"):
                trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()


def config_of(dataset: Path, folder: Path, output: Path, **changes: Any) -> Any:
    training = {"max_steps": 3, "learning_rate": 0.01, "batch_size": 4, "gradient_accumulation_steps": 1}
    training |= changes.pop("training", {})
    return make_config(dataset, folder, output, training=training, **changes)


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


def text_model(folder: Path) -> Path:
    """A random tiny Llama with the tokenizer of the students that see images."""
    tokenizer = vision.vision_tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_student_of_text_is_refused_or_trains_on_the_rows_without_images(dataset: Path, tmp_path: Path) -> None:
    text = text_model(tmp_path / "text")
    with pytest.raises(StudentSeesNoImages, match="without_images"):
        train(config_of(dataset, text, tmp_path / "run"))
    config = config_of(
        dataset,
        text,
        tmp_path / "run",
        data={"rows": "without_images"},
        eval_dataset=str(dataset),
        training={"pack_length": 256, "max_steps": 2},
    )
    assert train(config).steps == 2
    student = LlamaForCausalLM.from_pretrained(tmp_path / "run/student")
    with pytest.raises(StudentSeesNoImages, match="--rows without_images"):
        evaluate_on_dataset(student, dataset)
    rows = [row for row in open_dataset(dataset).rows() if not row.media]
    assert evaluate_on_dataset(student, dataset, rows="without_images").targets == sum(
        row.positions.size for row in rows
    )


def test_a_student_that_sees_images_may_train_on_text_also_packed(
    llava: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = vision.vision_rows(llava, [0] * 6)
    text = vision.vision_dataset(tmp_path / "text", [rows], tokenizer=llava, sees=False)
    for pack_length in (None, 300):
        config = config_of(text, llava, tmp_path / f"run {pack_length}", training={"pack_length": pack_length})
        train(config)
        before, after = loaded(llava).state_dict(), loaded(tmp_path / f"run {pack_length}" / "student").state_dict()
        moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
        assert moved
        assert not any("vision" in name or "projector" in name for name in moved)
    with pytest.raises(PackingUnsupported, match="pack_length to null"):
        train(config_of(dataset, llava, tmp_path / "packed", training={"pack_length": 300}))


def test_text_of_a_teacher_that_sees_images_trains_a_student_of_text_also_packed(
    llava: Path, dataset: Path, tmp_path: Path
) -> None:
    """Its header names a processor, and no row has an image: only the rows tell."""
    rows = vision.vision_rows(llava, [0] * 6)
    spoken = vision.vision_dataset(tmp_path / "spoken", [rows[:3], rows[3:]], tokenizer=llava)
    assert load_logit_dataset(spoken).shows_images
    assert not load_logit_dataset(spoken).has_images()
    for student in (text_model(tmp_path / "text"), llava):
        for pack_length in (None, 300):
            output = tmp_path / f"{student.name} {pack_length}"
            config = config_of(spoken, student, output, training={"pack_length": pack_length, "max_steps": 1})
            assert train(config).steps == 1
    late = vision.vision_dataset(
        tmp_path / "late", [rows[:3], vision.vision_rows(llava, [0, 1], seed=1)], tokenizer=llava
    )
    assert load_logit_dataset(late).has_images()
    assert not load_logit_dataset(late, rows="without_images").has_images()
    with pytest.raises(StudentSeesNoImages, match="without_images"):
        train(config_of(late, tmp_path / "text", tmp_path / "refused"))


def test_a_warning_about_training_on_text_alone_says_why(
    llava: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(student_images.logger, "warning", said.append)
    trained = load_logit_dataset(dataset, rows="without_images")
    model = loaded(llava)
    student_images.check_dataset_images(trained, images_of(model), model, name="S", packs=False)
    assert said == ["S sees images, and rows with images are left out: rows of text train its text"]


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
