"""The end of a run: its last checkpoint comes in; the finished student, its card and the run's report are on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig
from .data import LogitDataset
from .losses import read_loss
from .model_card import model_card
from .run_folder import ADAPTER_FOLDER, REPORT_NAME, STATE_NAME, STUDENT_FOLDER, Checkpoint, write_json
from .run_report import run_report
from .step_record import STATE_NAME as RECORD_NAME
from .student import merged, tokenizer_files

_RESUME_ONLY = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    STATE_NAME,
    "training_args.bin",
    "README.md",
)


def write_student(config: TrainConfig, dataset: LogitDataset, last: Checkpoint) -> None:
    """Write `student/` from the best or last checkpoint, and the log and the report of the run.

    Raises what `tokenizer_files` raises.
    """
    output, chosen = Path(config.output), last.best
    student, adapter = output / STUDENT_FOLDER, output / ADAPTER_FOLDER
    for folder in (student, adapter):
        shutil.rmtree(folder, ignore_errors=True)
    lora = config.student.lora
    if lora is not None and lora.merge:
        assert config.student.model is not None
        _copy(chosen.folder, adapter)
        plain = merged(config.student.model, adapter, dtype=getattr(torch, config.student.weights))
        plain.save_pretrained(student)
    else:
        _copy(chosen.folder, student)
    for name, data in tokenizer_files(config.student, dataset.sources.datasets[0]).items():
        (student / name).write_bytes(data)
    card = model_card(
        student=config.student.model or "",
        headers=[source.header for source in dataset.sources.datasets],
        dataset_ids=dataset.dataset_ids,
        loss=read_loss(config.loss),
        record=chosen.state["stateful_callbacks"][RECORD_NAME]["attributes"],
        steps=chosen.step,
        adapters=lora is not None and not lora.merge,
        recipe=_recipe(config),
    )
    (student / "README.md").write_text(card, encoding="utf-8")
    write_json(output / STATE_NAME, last.state)
    (output / REPORT_NAME).write_text(run_report(last.state["log_history"]), encoding="utf-8")


def push_student(output: Path, repository: str) -> None:
    """Upload `student/` to the Hub; the repository is made if it is not there. Raises huggingface_hub's errors."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repository, exist_ok=True)
    hub.upload_folder(
        repo_id=repository, folder_path=output / STUDENT_FOLDER, commit_message="A student, taught from a cache"
    )


def _copy(checkpoint: Path, folder: Path) -> None:
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*_RESUME_ONLY))


def _recipe(config: TrainConfig) -> dict[str, Any]:
    """The settings that are not the defaults, without the places of this machine."""
    recipe = config.model_dump(exclude={"dataset", "output", "eval_dataset"}, exclude_defaults=True)
    if Path(config.student.name).is_dir():
        recipe["student"]["model"] = Path(config.student.name).name
    return recipe
