"""Compares the writers that headers name with the student in training, for losses on rows that the student wrote.

A header names the model that wrote its rows by the digest of its weights, and the round in which it wrote them. Rows
are the student's own in two cases: its weights, as it starts, wrote them; or they are of an earlier round than rows of
that kind, and one model wrote all rows of that round. Of the second kind, no header can show more.

A header names weights of the Hub by their commit, and those of a folder by a digest of the files. So that a model of
the Hub and a copy of it in a folder are the same, the digest of a commit is computed too, if the Hub's cache of this
machine holds its weights.
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

from coldstill.common.hub_commit import hub_commit
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
    own = () if name is None else _of_hub(name, commit) if commit else student_fingerprints(name)
    of_datasets = [(each.store.url, as_own(each.header.about.writer, own)) for each in dataset.all_datasets]
    writers = [writer for _, writer in of_datasets if writer is not None]
    foreign = foreign_writers(writers, own=own[0] if own else None)
    for place, writer in of_datasets:
        if writer in foreign:
            raise NotStudentRows(
                f"loss.name {loss.name}: {place}",
                found=f"rows that {writer.name} wrote in round {writer.round}, weights {writer.weights_fingerprint}",
                wanted=f"rows of the student {name or 'from scratch'}, weights "
                f"{own[0] if own else 'that no file holds'}, or of an earlier round than its newest ones",
                fix=f"capture the answers of this student, as `coldstill rounds` does, {_hub_name_fix(writer, own)}or "
                f"{other_rows_fix(loss)}",
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


def student_fingerprints(name: str) -> tuple[str, ...]:
    """The names in `RowWriter` of the weights in the folder or of the Hub name `name`: the one that a capture writes,
    then others of the same weights. Empty if there are no files.

    That of an adapter is after that of its base model.
    """
    try:
        if is_adapter(name):
            bases = student_fingerprints(PeftConfig.from_pretrained(name).base_model_name_or_path or "") or (None,)
            files = [cached_file(name, file) for file in (ADAPTER_SETTINGS, ADAPTER_WEIGHTS)]
            own = adapter_fingerprint(Path(files[0]).parent)
            return tuple(f"{base} + {own}" for base in bases)
        if Path(name).is_dir():
            return (weights_fingerprint(Path(name)),)
        commit = hub_commit(name, config=AutoConfig.from_pretrained(name))
        return _of_hub(name, commit) if commit else ()
    except (OSError, ValueError):
        return ()


def as_own(writer: RowWriter | None, own: Sequence[str]) -> RowWriter | None:
    """The writer with the first of the names `own` of the student's weights, if it has any of them."""
    if writer is None or not own or writer.weights_fingerprint == own[0]:
        return writer
    commit = writer.weights_fingerprint.removeprefix(hub_fingerprint(""))
    is_commit = commit != writer.weights_fingerprint and " " not in commit
    names = _of_hub(writer.name, commit) if is_commit else (writer.weights_fingerprint,)
    return writer.model_copy(update={"weights_fingerprint": own[0]}) if {*names} & {*own} else writer


def _of_hub(name: str, commit: str) -> tuple[str, ...]:
    """The names of a model of the Hub: its commit, and the digest of its files, if they are in this machine's cache."""
    known = (hub_fingerprint(commit),)
    if Path(name).is_dir():
        return known
    try:
        config = cached_file(name, "config.json", revision=commit, local_files_only=True)
    except (OSError, ValueError):
        return known
    folder = Path(config).parent
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return (*known, weights_fingerprint(folder)) if has_weights else known


def _hub_name_fix(writer: RowWriter, own: Sequence[str]) -> str:
    """What to do where the writer is of the Hub and the student a folder, which may be a copy of it."""
    is_of_hub = writer.weights_fingerprint.startswith(hub_fingerprint(""))
    if not is_of_hub or not own or own[0].startswith(hub_fingerprint("")):
        return ""
    return f"set student.model: {writer.name} if the folder is a copy of it, "


def _loaded_from(student: torch.nn.Module | str | StudentConfig) -> tuple[str | None, str | None]:
    """Folder or Hub name of the student's weights, None for random ones; and, of a loaded model of the Hub, the commit:
    the one that transformers noted, or that of the main branch in this machine's cache."""
    if isinstance(student, str):
        return student, None
    if isinstance(student, StudentConfig):
        return student.model, None
    config: Any = innermost(student).config
    name = str(config.name_or_path or "")
    return name or None, hub_commit(name, config=config) if name and not Path(name).is_dir() else None
