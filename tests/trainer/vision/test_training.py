"""Students that see images: losses and gradients of a plain reference, resuming, rows of text alone.

Two families with different patch counts train from one dataset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from coldstill import load_logit_dataset
from coldstill.storage_schema.dataset import open_dataset
from coldstill.trainer.errors import CheckpointMismatch, PackingUnsupported, StudentSeesNoImages
from coldstill.trainer.evaluation.evaluate import evaluate_on_dataset
from coldstill.trainer.student import images as student_images
from coldstill.trainer.student.images import images_of
from coldstill.trainer.train import train
from tests import reference, vision
from tests.trainer.training import KillAt, Killed, Seen, build, weights_of

from .students import config_of, loaded, own_logits, text_model

T = 0.4
"""t of the first step."""


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
