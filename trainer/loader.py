"""From a stream to the model: a stream of batches comes in, a DataLoader goes out; a batch comes in, the model's own
arguments go out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from .data import LogitStream


def batch_loader(stream: LogitStream, args: TrainingArguments) -> DataLoader:
    """The batches of `stream` as they are, made in as many processes as `args` asks for."""
    workers = args.dataloader_num_workers
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        pin_memory=args.dataloader_pin_memory,
        # Of its own: a loader draws a seed when it begins, and dropout must not depend on how often that was.
        generator=torch.Generator(),
    )


def model_inputs(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Rows are told apart by a mask, packed ones by positions: then there is no mask, and a model that knows no
    `position_ids` serves as long as rows are not packed."""
    marks = "attention_mask" if "attention_mask" in batch else "position_ids"
    return {"input_ids": batch["input_ids"], marks: batch[marks]}
