"""Compares the writers that headers name with the student in training, for losses on rows that the student wrote.

A header names the model that wrote its rows by the digest of its weights, and the round in which it wrote them. Rows
are the student's own in two cases: its weights, as it starts, wrote them; or they are of an earlier round than rows of
that kind, and one model wrote all rows of that round. Of the second kind, no header can show more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoConfig
from transformers.utils import cached_file

from coldstill.storage_schema.header_facts import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    RowWriter,
    adapter_fingerprint,
    hub_fingerprint,
    weights_fingerprint,
)
from coldstill.trainer.config import StudentConfig
from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.errors import NotStudentRows
from coldstill.trainer.losses.base import Loss, other_rows_fix

from .forward import innermost
from .lora import is_adapter


def check_writers(loss: Loss, dataset: LogitDataset, student: torch.nn.Module | str | StudentConfig) -> None:
    """Raise `NotStudentRows` if `loss` needs rows of the student, and another model wrote those of a dataset.

    A student given as an object is compared by the folder or name that it was loaded from, adapters apart.
    """
    if "student_rows" not in loss.all_needs:
        return
    name, commit = _loaded_from(student)
    own = None if name is None else hub_fingerprint(commit) if commit else student_fingerprint(name)
    of_datasets = [(each.store.url, each.header.about.writer) for each in dataset.all_datasets]
    writers = [writer for _, writer in of_datasets if writer is not None]
    foreign = foreign_writers(writers, own=own)
    for place, writer in of_datasets:
        if writer in foreign:
            raise NotStudentRows(
                f"loss.name {loss.name}: {place}",
                found=f"rows that {writer.name} wrote in round {writer.round}, weights {writer.weights_fingerprint}",
                wanted=f"rows of the student {name or 'from scratch'}, weights {own or 'that no file holds'}, or of an "
                "earlier round than its newest ones",
                fix=f"capture the answers of this student, as `coldstill rounds` does, or {other_rows_fix(loss)}",
            )


def foreign_writers(writers: Sequence[RowWriter], *, own: str | None) -> list[RowWriter]:
    """Those of `writers` that are neither the student with the weights `own` nor one of an earlier round of it."""
    newest = max((writer.round for writer in writers if writer.weights_fingerprint == own), default=-1)
    of_round: dict[int, set[str]] = defaultdict(set)
    for writer in writers:
        of_round[writer.round].add(writer.weights_fingerprint)
    return [
        writer
        for writer in writers
        if writer.weights_fingerprint != own and (writer.round >= newest or len(of_round[writer.round]) > 1)
    ]


def student_fingerprint(name: str) -> str | None:
    """The digest of the model in the folder or of the Hub name `name` as `RowWriter` has it; None if it has no files.

    That of an adapter is after that of its base model.
    """
    try:
        if is_adapter(name):
            base = student_fingerprint(PeftConfig.from_pretrained(name).base_model_name_or_path or "")
            files = [cached_file(name, file) for file in (ADAPTER_SETTINGS, ADAPTER_WEIGHTS)]
            return f"{base} + {adapter_fingerprint(Path(files[0]).parent)}"
        if Path(name).is_dir():
            return weights_fingerprint(Path(name))
        commit = getattr(AutoConfig.from_pretrained(name), "_commit_hash", None)
        return hub_fingerprint(commit) if commit else None
    except (OSError, ValueError):
        return None


def _loaded_from(student: torch.nn.Module | str | StudentConfig) -> tuple[str | None, str | None]:
    """Folder or Hub name of the student's weights, None for random ones; and, of a loaded model of the Hub, the commit,
    which may not be the newest."""
    if isinstance(student, str):
        return student, None
    if isinstance(student, StudentConfig):
        return student.model, None
    config: Any = innermost(student).config
    return config.name_or_path or None, getattr(config, "_commit_hash", None)
