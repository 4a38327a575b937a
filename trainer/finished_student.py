"""Writes the finished student: its model files, its model card, and the report of the run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCardData
from transformers.trainer import TRAINER_STATE_NAME

from coldstill.common.files import write_json
from coldstill.storage_schema.header import DatasetHeader

from .checkpoint_files import FILES_NAME
from .checkpoints import ADAPTER_FOLDER, REPORT_NAME, STUDENT_FOLDER, Checkpoint
from .config import TrainConfig
from .data.logit_dataset import LogitDataset
from .losses import read_loss
from .losses.base import Loss
from .student.lora import merged
from .student.tokenizer import tokenizer_files, warn_if_unfaithful

MOST_ROWS = 40
"""Most rows of a table. Of longer logs, evenly spaced lines are shown, with the first and the last."""
BARS = " ▁▂▃▄▅▆▇█"
LOGGED = ("step", "epoch", "taid_t", "taid_momentum", "loss", "bucket_kl", "learning_rate", "grad_norm")
_RESUME_ONLY = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    TRAINER_STATE_NAME,
    "training_args.bin",
    FILES_NAME,
    "README.md",
)
"""Files of a checkpoint that the finished student does not need."""


def write_student(config: TrainConfig, dataset: LogitDataset, last: Checkpoint) -> None:
    """Write `student/` from the best checkpoint up to `last`, and the log and the report of the run.

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
    warn_if_unfaithful(student)
    card = model_card(
        student=config.student.model or "",
        headers=[source.header for source in dataset.sources.datasets],
        dataset_ids=dataset.dataset_ids,
        loss=read_loss(config.loss),
        record=chosen.record,
        steps=chosen.step,
        adapters=lora is not None and not lora.merge,
        recipe=_recipe(config),
    )
    (student / "README.md").write_text(card, encoding="utf-8")
    write_json(output / TRAINER_STATE_NAME, last.state, sort_keys=True)
    (output / REPORT_NAME).write_text(run_report(last.state["log_history"]), encoding="utf-8")


def push_student(output: Path, repository: str) -> None:
    """Upload `student/` to the Hub and create the repository if needed. Raises the errors of huggingface_hub."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repository, exist_ok=True)
    hub.upload_folder(
        repo_id=repository, folder_path=output / STUDENT_FOLDER, commit_message="Student distilled with Coldstill"
    )


def model_card(
    *,
    student: str,
    headers: Sequence[DatasetHeader],
    dataset_ids: Sequence[str],
    loss: Loss,
    record: Mapping[str, Any],
    steps: int,
    adapters: bool,
    recipe: Mapping[str, Any] | None = None,
) -> str:
    """The text of the student's `README.md`: Markdown with the Hub's metadata.

    `student`: the model before training; only the name of a local folder is shown. `record`: the state of `StepRecord`
    at the end. `recipe`: the settings that repeat the run.
    """
    base = Path(student).name if Path(student).is_dir() else student
    data = ModelCardData(
        library_name="peft" if adapters else "transformers",
        base_model=base if "/" in base else None,
        pipeline_tag="text-generation",
        tags=["coldstill", "knowledge-distillation", loss.name],
    )
    facts = {
        "initial student": base or "random weights",
        "teacher": ", ".join(_teacher(header) for header in headers),
        "dataset id": ", ".join(dataset_ids),
        "dataset license": ", ".join(header.about.license or "not stated" for header in headers),
        "loss": loss.heading,
        "share of cross-entropy in the loss": f"{loss.label_share:g}",
        "optimizer steps": f"{steps:,}",
        "target positions": f"{record['targets']:,}",
    }
    if record["schedule"] is not None:
        facts["final t"] = f"{record['schedule']['t']:.4f}"
    lines = ["---", data.to_yaml(), "---", "", f"# {base or 'Student'}, distilled from cached teacher logits", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_escaped(value)} |" for name, value in facts.items())]
    if recipe is not None:
        settings = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).rstrip()
        lines += [
            "",
            "Settings of `coldstill train CONFIG.yaml`, without dataset and output paths:",
            "",
            "```yaml",
            settings,
            "```",
        ]
    return "\n".join([*lines, ""])


def run_report(log: Sequence[Mapping[str, Any]]) -> str:
    """The text of `report.md`: the curve of t, the training log, and the evaluations on held-out rows."""
    logged = [line for line in log if "loss" in line]
    measured = [line for line in log if "eval_loss" in line]
    text = ["# Training report", ""]
    t = [line["taid_t"] for line in logged if "taid_t" in line]
    if t:
        text += [f"t from {t[0]:.3f} to {t[-1]:.3f}: `{_curve(t)}`", ""]
    text += _table(logged, [name for name in LOGGED if any(name in line for line in logged)])
    if measured:
        names = [name for name in measured[0] if name.startswith("eval_")]
        text += ["", "## Evaluation on held-out rows", "", *_table(measured, ["step", *names])]
    return "\n".join([*text, ""])


def _copy(checkpoint: Path, folder: Path) -> None:
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*_RESUME_ONLY))


def _recipe(config: TrainConfig) -> dict[str, Any]:
    """The settings that differ from the defaults, without paths of this machine."""
    recipe = config.model_dump(exclude={"dataset", "output", "eval_dataset"}, exclude_defaults=True)
    if Path(config.student.name).is_dir():
        recipe["student"]["model"] = Path(config.student.name).name
    return recipe


def _teacher(header: DatasetHeader) -> str:
    revision = f" at {header.teacher.revision[:12]}" if header.teacher.revision else ""
    return f"{header.teacher.name}{revision}, top {header.top_k} log-probs, {header.draws} draws"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _curve(values: Sequence[float]) -> str:
    """One character per value between 0 and 1."""
    return "".join(BARS[round(value * (len(BARS) - 1))] for value in _evenly_spaced(values))


def _table(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    rows = [" | ".join(_cell(line.get(name)) for name in names) for line in _evenly_spaced(lines)]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *(f"| {row} |" for row in rows)]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _evenly_spaced(items: Sequence[Any]) -> list[Any]:
    if len(items) <= MOST_ROWS:
        return list(items)
    return [items[round(n * (len(items) - 1) / (MOST_ROWS - 1))] for n in range(MOST_ROWS)]
