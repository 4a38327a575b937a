"""Where a run goes on: a checkpoint and the order of this run's data come in, a place in the data goes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .data import LogitDataset
from .run_folder import read_state, require_same
from .step_record import STATE_NAME


@dataclass(frozen=True)
class ResumePoint:
    """`step` optimizer steps were taken; the next batch comes behind `cursor`, the first one where that is None."""

    step: int = 0
    cursor: dict[str, Any] | None = None


def data_order(args: TrainingArguments, dataset: LogitDataset, *, pack_length: int | None) -> dict[str, Any]:
    """What decides which rows an optimizer step sees; all of it is compared with a checkpoint's."""
    return {
        "dataset_ids": list(dataset.dataset_ids),
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "batch_size": args.per_device_train_batch_size,
        "pack_length": pack_length,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "devices": args.world_size,
    }


def resume_point(folder: Path, order: Mapping[str, Any]) -> ResumePoint:
    """Of the checkpoint in `folder`. Raises `CheckpointMismatch` for one of another dataset or order, or of no run of
    ours."""
    state = read_state(folder) or {}
    saved = state.get("stateful_callbacks", {}).get(STATE_NAME, {}).get("attributes", {})
    require_same(
        f"{folder}: the run of this checkpoint",
        saved.get("order", {}),
        order,
        fix="go on with the dataset and the order it was begun with, or start anew in another folder",
    )
    return ResumePoint(int(state["global_step"]), saved["cursor"])
