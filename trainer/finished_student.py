"""Writes the finished student: its model files, its model card, and `report.md`, the tables of its log."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME

from coldstill.common.attention import evaluation_mode
from coldstill.common.charts import figure
from coldstill.common.files import STUDENT_FOLDER, write_json
from coldstill.common.visible import plain
from coldstill.storage_schema.header import DatasetHeader

from .alignment.objective import alignment_counts, alignment_facts
from .alignment.student import header_of_student
from .checkpoint_files import FILES_NAME
from .checkpoints import ADAPTER_FOLDER, REPORT_NAME, Checkpoint
from .config import TrainConfig
from .data.logit_dataset import LogitDataset
from .errors import StudentDiffers
from .losses import read_loss
from .losses.base import Loss, with_tail
from .sharding import is_sharded
from .student.forward import innermost
from .student.images import STUDENT_FILES, image_probe, images_of, processor_files
from .student.load import check_attention, fit_end_tokens
from .student.lora import merged
from .student.tokenizer import load_with_images, other_tokenizer, special_tokens, tokenizer_files, warn_if_unfaithful

MOST_ROWS = 40
"""Most rows of a table. Of longer logs, evenly spaced lines are shown, with the first and the last."""
BARS = " ▁▂▃▄▅▆▇█"
_SHARES = ("share_one_to_one", "share_in_larger_chunks", "share_lost", "skipped_rows")
LOGGED = ("step", "epoch", "taid_t", "taid_momentum", "loss", "bucket_kl", *_SHARES, "learning_rate", "grad_norm")
LOGITS_NAME = "trained_logits.safetensors"
"""File of a checkpoint with the logits of a few tokens, as the model in training computed them."""
MOST_TOKENS, MOST_POSITIONS = 64, 16
"""Tokens of that row, and positions of it whose logits are kept: 10 MB for 152,064 ids."""
ROUNDING_MARGIN = {torch.float32: 4.0, torch.float64: 4.0}
"""Largest accepted difference, as a multiple of what one unit in the last place of each weight makes; 2 for the 16-bit
dtypes. Merging rounds each weight by at most half a unit, and each activation is rounded by half a unit in both models.
Only where sums are as coarse as the weights, in float32 and float64, the rounding of sums comes to it."""
_RESUME_ONLY = (
    LOGITS_NAME,
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    TRAINER_STATE_NAME,
    "training_args.bin",
    FILES_NAME,
    "README.md",
    ".*.part",  # of a killed writer
)
"""Files of a checkpoint that the finished student does not need."""


@dataclass(frozen=True)
class TrainedLogits:
    """`logits [P, V]` of a model at evenly spaced positions of `tokens int64 [T]`; of a row with an image, at its last
    positions. They are float32, but for a sharded model that computes in bfloat16."""

    tokens: torch.Tensor
    logits: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: torch.nn.Module, tokens: torch.Tensor, images: Mapping[str, torch.Tensor] | None = None
    ) -> TrainedLogits:
        """Those of `model` in evaluation mode, in the precision of its weights. `images`: inputs beside the tokens.

        A sharded model computes on all devices at once, and in bfloat16 if it trains so: then the logits are too."""
        inner = innermost(model)
        device = inner.device
        inputs = {"input_ids": tokens[None].to(device), "attention_mask": torch.ones_like(tokens)[None].to(device)}
        for name, value in (images or {}).items():
            inputs[name] = value.to(device, inner.dtype if value.is_floating_point() else None)
        with evaluation_mode(model):
            # The forward of the class: in training, that of the object is under the autocast of accelerate.
            forward = model if is_sharded(model) else MethodType(type(model).forward, model)
            logits = forward(**inputs, use_cache=False).logits[0]
        first = max(0, len(logits) - MOST_POSITIONS) if images else 0
        picked = torch.linspace(first, len(logits) - 1, min(MOST_POSITIONS, len(logits))).round().long()
        kept = logits[picked.to(device)].cpu().contiguous()
        return cls(tokens.cpu(), kept if is_sharded(model) else kept.float())

    def write(self, checkpoint: Path) -> None:
        """Write them to the folder of a checkpoint."""
        save_file({"tokens": self.tokens, "logits": self.logits}, checkpoint / LOGITS_NAME)

    @classmethod
    def read(cls, checkpoint: Path) -> TrainedLogits | None:
        """Those of a checkpoint; None if an earlier release wrote it, or if the file is damaged."""
        try:
            return cls(**load_file(checkpoint / LOGITS_NAME))
        except (OSError, SafetensorError, TypeError):
            return None


def first_row(batch: Mapping[str, Any]) -> torch.Tensor:
    """The first tokens of a batch's first row, without padding."""
    row = batch["input_ids"][0]
    length = int(batch["attention_mask"][0].sum()) if "attention_mask" in batch else len(row)
    return row[: min(length, MOST_TOKENS)].cpu().contiguous()


def write_student(config: TrainConfig, dataset: LogitDataset, last: Checkpoint) -> None:
    """Write `student/` from the best checkpoint up to `last`, and the log and the report of the run.

    The student is loaded again and compared with the model that was trained. Raises `StudentDiffers`, and what
    `tokenizer_files` raises.
    """
    output, chosen = Path(config.output), last.best
    student, adapter = output / STUDENT_FOLDER, output / ADAPTER_FOLDER
    for folder in (student, adapter):
        shutil.rmtree(folder, ignore_errors=True)
    lora, written = config.student.lora, [student]
    files = tokenizer_files(config.student, dataset.sources.datasets[0])
    other = other_tokenizer(config.student, dataset)
    header = dataset.header if other is None else header_of_student(dataset, other)
    of_images = processor_files(config.student)
    if lora is not None and lora.merge:
        assert config.student.model is not None
        _copy(chosen.folder, adapter)
        options = {"images": True} if of_images else {}
        model = merged(config.student.model, adapter, dtype=getattr(torch, config.student.weights), **options)
        fit_end_tokens(model, special_tokens(files, header), name=config.student.name)
        model.save_pretrained(student)
        written.append(adapter)
        del model
    else:
        _copy(chosen.folder, student)
    files |= of_images
    for name, data in files.items():
        for folder in written:
            (folder / name).write_bytes(data)
    warn_if_unfaithful(student)
    _check_student(config, header, chosen, written, files)
    card = model_card(
        student=config.student.model or "",
        headers=[source.header for source in dataset.all_datasets],
        dataset_ids=dataset.dataset_ids,
        shares=dataset.shares(),
        loss=read_loss(config.loss),
        draws=[part.draws for part in dataset.by_teacher],
        record=chosen.record,
        steps=chosen.step,
        adapters=lora is not None and not lora.merge,
        sees_images=bool(of_images),
        recipe=_recipe(config),
    )
    (student / "README.md").write_text(card, encoding="utf-8")
    write_json(output / TRAINER_STATE_NAME, last.state, sort_keys=True)
    (output / REPORT_NAME).write_text(report_text(last.state["log_history"]), encoding="utf-8")


def _check_student(
    config: TrainConfig,
    header: DatasetHeader,
    chosen: Checkpoint,
    written: Sequence[Path],
    files: Mapping[str, bytes],
) -> None:
    """Remove the student and raise `StudentDiffers` unless it gives the trained logits. One model at a time is loaded.

    `written`: the folders of the student and, if they were merged into it, of its adapters. `files`: of its tokenizer
    and processor.
    """
    student, *adapter = written
    trained = TrainedLogits.read(chosen.folder)
    if trained is None:
        row = torch.arange(MOST_TOKENS // 4) % header.token_count
        trained = _logits(_reloaded(config, adapter[0] if adapter else chosen.folder, header, files), row)
    model = _reloaded(config, student, header)
    if trained.logits.dtype == torch.bfloat16:
        model.to(torch.bfloat16)
    found = _logits(model, trained.tokens)
    if not torch.equal(found.tokens, trained.tokens):
        differs = f"an image that becomes {len(found.tokens)} tokens with its text, not {len(trained.tokens)}"
    elif found.logits.shape == trained.logits.shape:
        off = found.logits - trained.logits
        if not off.any():
            return
        rounding = _rounding(model, found)
        margin = ROUNDING_MARGIN.get(innermost(model).dtype, 2.0)
        if all(float(size(off)) <= margin * float(size(rounding)) for size in (_mean_size, _largest)):
            return
        differs = f"logits off by {_mean_size(off):.2g}, where rounding of the weights makes {_mean_size(rounding):.2g}"
    else:
        differs = f"logits of shape {tuple(found.logits.shape)} instead of {tuple(trained.logits.shape)}"
    shutil.rmtree(student)
    fix = f"use the adapters in {adapter[0]} unmerged" if adapter else "try another release of transformers or peft"
    raise StudentDiffers(
        f"{student}: the finished student, loaded again as a {type(innermost(model)).__name__}",
        found=differs,
        wanted=f"the logits of the model in training at step {chosen.step}, but for rounding",
        fix=f"{fix}; the trained weights are in {chosen.folder}, and nothing was removed there",
    )


def _reloaded(
    config: TrainConfig, folder: Path, header: DatasetHeader, files: Mapping[str, bytes] | None = None
) -> Any:
    """The student in `folder`; by default its tokenizer and processor are there too."""
    gc.collect()
    given = config.student.model_copy(update={"model": str(folder), "from_scratch": None, "lora": None, "freeze": []})
    if files is None:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in STUDENT_FILES}
    model = load_with_images(given, header, files=files).to("cuda" if torch.cuda.is_available() else "cpu")
    check_attention(innermost(model), name=str(folder))
    return model


def _logits(model: Any, tokens: torch.Tensor) -> TrainedLogits:
    """Those of a model that reads text alone at `tokens`; of one that reads images, of a row with an image."""
    images = images_of(model)
    if images is None:
        return TrainedLogits.of(model, tokens)
    return TrainedLogits.of(model, *image_probe(images, innermost(model)))


@torch.no_grad()
def _rounding(model: torch.nn.Module, found: TrainedLogits) -> torch.Tensor:
    """What one unit in the last place of each weight, up or down, changes in the logits. The model is spoiled."""
    generator = torch.Generator(innermost(model).device).manual_seed(0)
    for weight in model.parameters():
        if weight.is_floating_point():
            up = torch.empty_like(weight, dtype=torch.int8).random_(0, 2, generator=generator)
            weight.add_(weight * (2 * up - 1), alpha=torch.finfo(weight.dtype).eps)
    return _logits(model, found.tokens).logits - found.logits


def _mean_size(off: torch.Tensor) -> torch.Tensor:
    return off.double().square().mean().sqrt()


def _largest(off: torch.Tensor) -> torch.Tensor:
    return off.abs().max()


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
    shares: Mapping[str, Sequence[float]] | None = None,
    loss: Loss,
    record: Mapping[str, Any],
    steps: int,
    adapters: bool,
    sees_images: bool = False,
    recipe: Mapping[str, Any] | None = None,
    draws: Sequence[int] = (),
) -> str:
    """The text of the student's `README.md`: Markdown with the Hub's metadata.

    `student`: the model before training; only the name of a local folder is shown. `shares`: of the datasets, by
    what they are shares of. `record`: the state of `StepRecord` at the end. `recipe`: the settings that repeat the run.
    `draws`: per position, of each teacher: the card names the tail that was used, not the setting `auto`.
    """
    base = Path(student).name if Path(student).is_dir() else student
    data = ModelCardData(
        library_name="peft" if adapters else "transformers",
        base_model=base if "/" in base else None,
        pipeline_tag="image-text-to-text" if sees_images else "text-generation",
        tags=["coldstill", "knowledge-distillation", loss.name],
    )
    facts = {
        "initial student": base or "random weights",
        "teacher": "; ".join(_teacher(header) for header in headers),
        "dataset id": ", ".join(dataset_ids),
        "dataset license": ", ".join(plain(header.about.license or "not stated") for header in headers),
        "loss": "; ".join(dict.fromkeys(with_tail(loss, draws=one).heading for one in draws)) or loss.heading,
        "share of cross-entropy in the loss": f"{loss.label_share:g}",
        "optimizer steps": f"{steps:,}",
        "target positions": f"{record['targets']:,}",
    }
    for name, values in (shares or {}).items():
        facts[name] = ", ".join(f"{value:.3g}" for value in values)
    if record["schedule"] is not None:
        facts["final t"] = f"{record['schedule']['t']:.4f}"
    if (counts := alignment_counts(record)) is not None:
        facts |= alignment_facts(counts)
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


def report_text(log: Sequence[Mapping[str, Any]]) -> str:
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
    """The settings that differ from the defaults, without paths of this machine: the card may be published."""
    paths: dict[str, Any] = {"dataset": True, "output": True, "eval_dataset": True, "data": {"ensemble", "cache_dir"}}
    recipe: dict[str, Any] = _without_folders(config.model_dump(exclude=paths, exclude_defaults=True))
    return {section: settings for section, settings in recipe.items() if settings != {}}


def _without_folders(value: Any) -> Any:
    """A setting in which each path of this machine is only its last name."""
    if isinstance(value, Mapping):
        return {name: _without_folders(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(one) for one in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or os.path.isdir(value)):
        return Path(value).name
    return value


def _teacher(header: DatasetHeader) -> str:
    revision = f" at {plain(header.teacher.revision[:12])}" if header.teacher.revision else ""
    adapter = f" with adapter {plain(header.teacher.adapter.name)}" if header.teacher.adapter else ""
    most = "top" if header.kept_ids == "top_k" else "most probable and named ids, at most"
    return f"{plain(header.teacher.name)}{revision}{adapter}, {most} {header.top_k} log-probs, {header.draws} draws"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _curve(values: Sequence[float]) -> str:
    """One character per value between 0 and 1."""
    return "".join(BARS[round(value * (len(BARS) - 1))] for value in _evenly_spaced(values))


def _table(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    rows = [" | ".join(_cell(line.get(name)) for name in names) for line in _evenly_spaced(lines)]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *(f"| {row} |" for row in rows)]


def _cell(value: Any) -> str:
    return "" if value is None else figure(value) if isinstance(value, float) else str(value)


def _evenly_spaced(items: Sequence[Any]) -> list[Any]:
    if len(items) <= MOST_ROWS:
        return list(items)
    return [items[round(n * (len(items) - 1) / (MOST_ROWS - 1))] for n in range(MOST_ROWS)]
