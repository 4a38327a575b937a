"""The output folder of a run: identity, checkpoints, resuming and early stopping.

run.json               the identity of the run; a run with another identity raises `CheckpointMismatch`
checkpoint-<step>/     written by transformers, and last `files.json`: the size and digest of each file in it
student/               the finished student: model, tokenizer and model card, loadable by `from_pretrained`
adapter/               the LoRA adapters alone, if they were merged into the student
trainer_state.json     the log of the whole run
report.html            the page of the run, rewritten as it runs; report.json: its data, for `coldstill compare`
report.md              the log as text: the curve of t, losses, measurements
train_summary.json     written last: its presence means that the run is finished
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from coldstill.common.errors import ColdstillError, first_line
from coldstill.common.files import RUN_NAME, SUMMARY_NAME, write_json
from coldstill.common.models import flat
from coldstill.common.processor import processor_sha256
from coldstill.storage_schema.errors import StorageFailed, StorageFull
from coldstill.storage_schema.header import DatasetHeader

from .checkpoint_files import damage, lacks_training_state
from .data.images import StudentImages
from .data.logit_dataset import LogitDataset
from .errors import CheckpointDamaged, CheckpointMismatch
from .sharding import is_sharded, load_sharded_weights
from .step_record import StepRecord

logger = logging.get_logger(__name__)

REPORT_NAME = "report.md"
ADAPTER_FOLDER = "adapter"
_FULL_BELOW_BYTES = 1 << 20
_WRITE_FAILED = ("PytorchStreamWriter", "inline_container", "I/O error", "file write failed", "unexpected pos")
"""Words of torch's and safetensors' errors for a write that failed. They carry no `errno`."""


class EarlyStopping(EarlyStoppingCallback):
    """The callback of transformers, with its count restored from the checkpoint and a checkpoint when it stops."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the count of a resumed run."""
        super().on_train_begin(args, state, control, **kwargs)
        # transformers stores the state of a callback under its class name.
        saved = state.stateful_callbacks.get(EarlyStopping.__name__) if state.global_step else None
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"] if saved else 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Count, and save a checkpoint if training stops."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop:
            control.should_save = True


@dataclass(frozen=True)
class Checkpoint:
    """The folder of a complete checkpoint, and the `trainer_state.json` in it."""

    folder: Path
    state: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the run took its last step, or stopped early."""
        return self.step >= int(self.state["max_steps"]) or self._stopped_early

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.state["global_step"])

    @property
    def record(self) -> dict[str, Any]:
        """The state of `StepRecord`."""
        return self.state["stateful_callbacks"][StepRecord.__name__]["attributes"]

    @cached_property
    def best(self) -> Checkpoint:
        """The checkpoint with the best measurement so far; this one if the run tracks none.

        Raises `CheckpointDamaged`.
        """
        best = self.state.get("best_model_checkpoint")
        folder = self.folder.parent / Path(best).name if best else self.folder
        return self if folder == self.folder else whole_checkpoint(folder)

    @property
    def _stopped_early(self) -> bool:
        saved = self.state["stateful_callbacks"].get(EarlyStopping.__name__)
        if saved is None:
            return False
        return saved["attributes"]["early_stopping_patience_counter"] >= saved["args"]["early_stopping_patience"]


@dataclass(frozen=True)
class ResumePoint:
    """Where a run continues: after `step` optimizer steps, with the batch behind `cursor` (None: the first batch)."""

    step: int = 0
    cursor: dict[str, Any] | None = None


def data_order(
    args: TrainingArguments,
    dataset: LogitDataset,
    *,
    pack_length: int | None,
    images: StudentImages | None = None,
    own_header: DatasetHeader | None = None,
) -> dict[str, Any]:
    """What determines the rows of each optimizer step and the patches of their images. A checkpoint stores it, and a
    resumed run must have the same. `own_header`: with the ids of the student's own tokenizer, if they are others."""
    return {
        "dataset_ids": list(dataset.dataset_ids),
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "batch_size": args.per_device_train_batch_size,
        "pack_length": pack_length,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "devices": args.world_size,
        # Only where it differs from what checkpoints of earlier releases did.
        **({"rows": "without_images"} if dataset.sources.without_images else {}),
        **({"ensemble_weights": list(dataset.ensemble_weights)} if dataset.ensemble_weights else {}),
        **({} if images is None else {"processor_sha256": processor_sha256(images.processor)}),
        **({} if own_header is None else {"student_tokenizer": own_header.tokenizer_fingerprint}),
    }


def resume_point(folder: Path, order: Mapping[str, Any], *, is_whole: bool = False) -> ResumePoint:
    """Where the run of the checkpoint in `folder` continues. `is_whole`: its files were checked already.

    Raises `CheckpointMismatch` if its dataset or data order differs, or if `DistillTrainer` did not write it;
    `CheckpointDamaged`, also if the state of the optimizer is missing, as with `save_only_model`.
    """
    state = read_state(folder) or {}
    saved = state.get("stateful_callbacks", {}).get(StepRecord.__name__, {}).get("attributes", {})
    if not state and folder.is_dir() and any(folder.iterdir()):
        whole_checkpoint(folder)
    _require_same(
        f"{folder}: the run of this checkpoint",
        saved.get("order", {}),
        order,
        fix="resume with the dataset and settings of that run, or start a new run in another output folder",
    )
    if not is_whole:
        whole_checkpoint(folder)
    if found := lacks_training_state(folder):
        raise _damaged(folder, found)
    return ResumePoint(int(state["global_step"]), saved["cursor"])


def claim(output: Path, identity: Mapping[str, Any], *, write: bool) -> None:
    """Make `output` the folder of the run that `identity` describes; without `write`, only check it.

    Raises `CheckpointMismatch` if the folder holds checkpoints or a student of another run.
    """
    output.mkdir(parents=True, exist_ok=True)
    occupied = any(map(read_state, _by_step(output))) or (output / SUMMARY_NAME).exists()
    if occupied:
        _require_same(
            f"{output}: the run in this folder",
            _read_json(output / RUN_NAME) or {},
            identity,
            fix="choose another output, or delete this folder if its run is not needed",
        )
    if write:
        write_json(output / RUN_NAME, identity, sort_keys=True)


def newest_checkpoint(output: Path) -> Checkpoint | None:
    """The whole checkpoint of the highest step. A damaged one is passed over with a warning that says what is wrong."""
    for folder in _by_step(output):
        try:
            return whole_checkpoint(folder)
        except CheckpointDamaged as error:
            logger.warning(f"{error.what} is damaged ({error.found}): an older checkpoint is used, if there is one")
    return None


def whole_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Raises `CheckpointDamaged` unless all its files are there with their content."""
    state = read_state(folder)
    found = damage(folder) or ("" if state is not None else f"no whole {TRAINER_STATE_NAME}")
    if found or state is None:
        raise _damaged(folder, found)
    return Checkpoint(folder, state)


def load_saved_weights(model: Any, folder: Path) -> None:
    """Load the weights that `save_pretrained` of the class of `model` wrote to `folder`, also into shards. Raises
    `CheckpointDamaged`."""
    try:
        if is_sharded(model):
            load_sharded_weights(model, folder)
        else:
            model.load_state_dict(type(model).from_pretrained(folder, dtype="auto").state_dict())
    except RuntimeError as error:
        raise _damaged(folder, first_line(error)) from error


def _damaged(folder: Path, found: str) -> CheckpointDamaged:
    return CheckpointDamaged(
        str(folder),
        found=found,
        wanted="all files of the checkpoint, as they were written",
        fix="copy it again from where it is whole, or continue from an older one of this run",
    )


def _by_step(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoint-*"), key=_step, reverse=True)


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """The `trainer_state.json` in the folder of a checkpoint; None if it is missing or incomplete."""
    return _read_json(checkpoint / TRAINER_STATE_NAME)


@contextmanager
def naming_failed_writes(output: Path) -> Iterator[None]:
    """Raise `StorageFull` for any exception of a library if the disk of `output` is full, and `StorageFailed` if it
    does not write."""
    try:
        yield
    except ColdstillError:
        raise
    except Exception as error:
        is_full = "No space left" in str(error) or _free_bytes(output) < _FULL_BELOW_BYTES
        if not is_full and not _is_failed_write(error, output):
            raise
        resume = "re-run the same command to resume from the last whole checkpoint"
        raise (StorageFull if is_full else StorageFailed)(
            f"{output}: writing a checkpoint or the student",
            found=first_line(error),
            wanted="space for two checkpoints and the finished student" if is_full else "a disk that takes each file",
            fix=f"free some space and {resume}" if is_full else f"repair the disk, or choose another, and {resume}",
        ) from error


def _free_bytes(output: Path) -> int:
    """On the disk of `output`, which may not exist yet."""
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _is_failed_write(error: Exception, output: Path) -> bool:
    if isinstance(error, OSError):
        name = error.filename if isinstance(error.filename, str) else ""
        return error.errno in (errno.EIO, errno.EROFS) or Path(name).is_relative_to(output)
    return any(words in str(error) for words in _WRITE_FAILED)


def _require_same(what: str, before: Mapping[str, Any], now: Mapping[str, Any], *, fix: str) -> None:
    sections = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if not sections:
        return
    found, wanted = flat({key: before.get(key) for key in sections}), flat({key: now.get(key) for key in sections})
    differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    # Another loss has other settings, which nobody changed.
    renamed = [key.removesuffix("name") for key in differing if key.endswith(".name")]
    keys = [key for key in differing if key.endswith(".name") or not key.startswith(tuple(renamed))] or sections
    raise CheckpointMismatch(
        f"{what} differs in {', '.join(keys)}",
        found=", ".join(f"{key}: {found.get(key)}" for key in keys),
        wanted=", ".join(f"{key}: {wanted.get(key)}" for key in keys),
        fix=fix,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else -1
