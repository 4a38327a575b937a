"""The functions of the public API: `capture`, `train` and `evaluate`. Each imports its room when it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from .pipeline.capture import CaptureSummary
    from .pipeline.config import CaptureConfig
    from .trainer.config import TrainConfig
    from .trainer.evaluation.report import EvaluationReport
    from .trainer.train import TrainSummary

Settings = TypeVar("Settings", bound=BaseModel)


def capture(config: CaptureConfig | Mapping[str, Any] | str | Path, *, repair: bool = False) -> CaptureSummary:
    """Run a teacher over a source, write a sealed dataset of its distributions and return what was written.

    `config` is a `CaptureConfig`, a mapping with its keys, or the path of a YAML file. Call it again with the same
    settings after an interruption: committed units are kept. Units with a lost or cut file are made again, also in a
    sealed dataset; with `repair`, all files are read, and those whose bytes have changed are made again too.

    Raises `PackagesMissing`, `ConfigInvalid`, `ConfigNotFound`, and what `coldstill.pipeline.capture.capture` raises;
    all of them are `ColdstillError`s.
    """
    from .common.packages import require_packages

    require_packages("capture", "ray", "torch", "transformers")
    from .pipeline.capture import capture as run_capture
    from .pipeline.config import CaptureConfig

    return run_capture(_checked(config, CaptureConfig), repair=repair)


def train(
    config: TrainConfig | Mapping[str, Any] | str | Path, *, callbacks: Sequence[TrainerCallback] = ()
) -> TrainSummary:
    """Train a student from a dataset, write it to `config.output` and return what the run took.

    `config` is a `TrainConfig`, a mapping with its keys, or the path of a YAML file; `callbacks` are transformers' own.
    Call it again with the same settings after an interruption: training resumes from the newest whole checkpoint.

    Raises `PackagesMissing`, `ConfigInvalid`, `ConfigNotFound`, and what `coldstill.trainer.train.train` raises; all of
    them are `ColdstillError`s.
    """
    from .common.packages import require_packages

    require_packages("train", "accelerate", "torch", "transformers")
    from .trainer.config import TrainConfig
    from .trainer.train import train as run_train

    return run_train(_checked(config, TrainConfig), callbacks=callbacks)


def evaluate(
    student: str | Path,
    dataset: str | Path,
    *,
    teacher: str | Path | None = None,
    batch_size: int = 8,
    rows: Literal["all", "without_images"] = "all",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> EvaluationReport:
    """Measure the model `student` (folder or hub name) on all rows of a sealed dataset.

    With `teacher`, that model is loaded too, and divergences over the whole vocabulary are measured in addition to
    those that the cache gives. `rows`: `without_images` passes over rows that have images. `dtype` is the data type of
    the models' weights.

    Raises `PackagesMissing` and what `coldstill.trainer.evaluation` raises; all of them are `ColdstillError`s.
    """
    from .common.packages import require_packages

    require_packages("train", "accelerate", "torch", "transformers")
    from .storage_schema.dataset import open_dataset
    from .trainer.evaluation.evaluate import evaluate_on_dataset
    from .trainer.evaluation.measured_model import load_measured

    opened = open_dataset(str(dataset))
    model = load_measured(str(student), opened, role="student", weights=dtype)
    resident = None
    if teacher is not None:
        resident = load_measured(str(teacher), opened, role="resident teacher", weights=dtype)
    return evaluate_on_dataset(
        model, str(dataset), teacher=resident, batch_size=batch_size, rows=rows, tokenizers_are_checked=True
    )


def _checked(config: Settings | Mapping[str, Any] | str | Path, model: type[Settings]) -> Settings:
    from .common.config_file import check_config, load_config

    if isinstance(config, model):
        return config
    if isinstance(config, Mapping):
        return check_config(config, model=model, where="config")
    return load_config(str(config), model=model)
