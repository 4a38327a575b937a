"""Laws of whole checkpoints: what is damaged is passed over and named, never read and never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from coldstill.storage_schema.errors import StorageFailed, StorageFull
from coldstill.trainer import checkpoints, distill_trainer
from coldstill.trainer.checkpoint_files import FILES_NAME, damage
from coldstill.trainer.checkpoints import Checkpoint, naming_failed_writes, newest_checkpoint, whole_checkpoint
from coldstill.trainer.errors import CheckpointDamaged, NonFiniteGradient, NonFiniteWeights
from coldstill.trainer.step_record import require_finite_weights
from coldstill.trainer.train import train
from tests.trainer.test_train import make_config
from tests.trainer.training import KillAt, Killed, build, weights_of

SHAPE = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "config.json",
    "trainer_state.json",
)
DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.fixture(scope="module")
def stopped(_sealed: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that was killed after the checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    trainer, _ = build(_sealed, tiny_student, output, callbacks=[KillAt(5)], **SHAPE)
    with pytest.raises(Killed):
        trainer.train()
    return output


def copied(output: Path, folder: Path, *, listed: bool) -> Path:
    """A copy of a run; without `listed`, its checkpoints are those of an earlier release."""
    shutil.copytree(output, folder)
    for each in () if listed else folder.glob(f"checkpoint-*/{FILES_NAME}"):
        each.unlink()
    return folder


def test_every_file_of_a_checkpoint_is_listed(stopped: Path) -> None:
    folder = stopped / "checkpoint-4"
    listed = json.loads((folder / FILES_NAME).read_text())["files"]
    assert {*listed, FILES_NAME} == {path.name for path in folder.iterdir()}
    assert set(FILES) <= set(listed)
    assert damage(folder) == ""


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "earlier release"])
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    stopped: Path, tmp_path: Path, name: str, how: str, listed: bool
) -> None:
    if not listed and name == "config.json" and how == "missing":
        pytest.skip("a resumed run does not read it")
    output = copied(stopped, tmp_path / "run", listed=listed)
    DAMAGES[how](output / "checkpoint-4" / name)
    found = newest_checkpoint(output)
    assert found is not None
    assert found.step == 2
    with pytest.raises(CheckpointDamaged, match="checkpoint-4"):
        whole_checkpoint(output / "checkpoint-4")


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_with_equal_weights(
    stopped: Path, tiny_dataset: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, _ = build(tiny_dataset, tiny_student, tmp_path / "unbroken", **SHAPE)
    unbroken.train()
    output = copied(stopped, tmp_path / "run", listed=True)
    DAMAGES["zeroed"](output / "checkpoint-4" / "optimizer.pt")
    resumed, _ = build(tiny_dataset, tiny_student, output, **SHAPE)
    said: list[str] = []
    monkeypatch.setattr(checkpoints.logger, "warning", said.append)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is damaged (optimizer.pt: other bytes" in said[0]
    wanted = weights_of(unbroken.model)
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights_of(resumed.model).items())
    assert damage(output / "checkpoint-4") == "", "written anew"


def test_a_run_without_a_whole_checkpoint_starts_anew(
    stopped: Path, tiny_dataset: Path, tiny_student: Path, tmp_path: Path
) -> None:
    output = copied(stopped, tmp_path / "run", listed=True)
    for step in (2, 4):
        DAMAGES["half"](output / f"checkpoint-{step}" / "model.safetensors")
    trainer, _ = build(tiny_dataset, tiny_student, output, **SHAPE)
    trainer.train(resume_from_checkpoint=True)
    assert [damage(folder) for folder in sorted(output.glob("checkpoint-*"))] == ["", ""]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_the_optimizers_state_is_a_named_error(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, name: str
) -> None:
    """transformers continues without them, with other weights; `save_only_model` writes neither."""
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, **SHAPE, max_steps=2, save_only_model=True)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert damage(folder) == ""
    other = {"optimizer.pt", "scheduler.pt"} - {name}
    (folder / other.pop()).write_bytes(b"")
    resumed, _ = build(tiny_dataset, tiny_student, tmp_path, **SHAPE, max_steps=4)
    with pytest.raises(CheckpointDamaged, match=name):
        resumed.train(resume_from_checkpoint=str(folder))


def test_a_damaged_best_checkpoint_is_named_and_no_other_is_taken(stopped: Path, tmp_path: Path) -> None:
    output = copied(stopped, tmp_path / "run", listed=True)
    newest = newest_checkpoint(output)
    assert newest is not None
    DAMAGES["half"](output / "checkpoint-2" / "model.safetensors")
    with pytest.raises(CheckpointDamaged, match="checkpoint-2"):
        _ = Checkpoint(newest.folder, {**newest.state, "best_model_checkpoint": "run/checkpoint-2"}).best


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_and_nothing_is_saved(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_student)
    trainer, _ = build(tiny_dataset, model, tmp_path, **{**SHAPE, "save_steps": 1}, max_grad_norm=1.0)
    weight = model.model.layers[0].mlp.up_proj.weight
    before: dict[str, torch.Tensor] = {}

    def broken(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.state.global_step < 2:
            return gradient
        before.update(weights_of(model))
        return gradient * float("inf")

    weight.register_hook(broken)
    with pytest.raises(NonFiniteGradient, match="optimizer step 3"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 2


def test_weights_that_are_not_finite_are_named_and_not_the_rows(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_student)
    trainer, _ = build(tiny_dataset, model, tmp_path, **SHAPE)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(NonFiniteWeights, match=r"model\.norm\.weight"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(5, "Input/output error"), StorageFailed),
        (OSError(28, "No space left on device"), StorageFull),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), StorageFailed),
        (RuntimeError("I/O error: No space left on device (os error 28)"), StorageFull),
    ],
)
def test_a_write_that_fails_has_a_name(tmp_path: Path, error: Exception, named: type[Exception]) -> None:
    with pytest.raises(named), naming_failed_writes(tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="other"), naming_failed_writes(tmp_path):
        raise RuntimeError("other")


def test_a_best_checkpoint_that_is_damaged_before_the_end_is_named(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path
) -> None:
    # A metric that never improves: the first measurement is the best.
    training = {"epochs": 4, "eval_steps": 2, "best_metric": "eval_teacher_cross_entropy"}
    config = make_config(tiny_dataset, tiny_student, tmp_path, training=training, eval_dataset=str(tiny_dataset))
    with pytest.raises(Killed):
        train(config, callbacks=[KillAt(7)])
    DAMAGES["half"](tmp_path / "checkpoint-2" / "model.safetensors")
    with pytest.raises(CheckpointDamaged, match="checkpoint-2"):
        train(config)


def test_the_best_checkpoint_of_a_run_in_a_moved_folder_is_kept_and_loaded(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path
) -> None:
    training = {"epochs": 4, "eval_steps": 2, "best_metric": "eval_teacher_cross_entropy"}
    config = make_config(
        tiny_dataset, tiny_student, tmp_path / "run", training=training, eval_dataset=str(tiny_dataset)
    )
    with pytest.raises(Killed):
        train(config, callbacks=[KillAt(7)])
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = config.model_copy(update={"output": str(tmp_path / "moved")})
    assert train(moved).student_step == 2


def test_older_checkpoints_are_deleted_only_after_the_list_of_the_new_one_is_written(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    finish = distill_trainer.finish_checkpoint

    def seeing(folder: Path) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        finish(folder)

    monkeypatch.setattr(distill_trainer, "finish_checkpoint", seeing)
    trainer, _ = build(
        tiny_dataset, tiny_student, tmp_path, **{**SHAPE, "save_steps": 1, "save_total_limit": 1}, max_steps=3
    )
    trainer.train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_of_eight_bits_are_not_checked_and_no_error(dtype: torch.dtype) -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight = torch.nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
    require_finite_weights(model)
