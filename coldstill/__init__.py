"""Coldstill: capture a teacher's next-token distributions once, train students from the shards.

The names in `__all__` are the public API. Each is imported on first use, so that `import coldstill` needs no torch, ray
or vllm. Everything else in this package is internal and may change in any release.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import capture as capture
    from .api import evaluate as evaluate
    from .api import train as train
    from .common.errors import ColdstillError as ColdstillError
    from .common.packages import __version__ as __version__
    from .pipeline.config import CaptureConfig as CaptureConfig
    from .storage_schema.dataset import open_dataset as open_dataset
    from .trainer.config import TrainConfig as TrainConfig
    from .trainer.data.logit_dataset import load_logit_dataset as load_logit_dataset
    from .trainer.distill_trainer import DistillTrainer as DistillTrainer

_MODULES = {
    "CaptureConfig": "pipeline.config",
    "ColdstillError": "common.errors",
    "DistillTrainer": "trainer.distill_trainer",
    "TrainConfig": "trainer.config",
    "__version__": "common.packages",
    "capture": "api",
    "evaluate": "api",
    "load_logit_dataset": "trainer.data.logit_dataset",
    "open_dataset": "storage_schema.dataset",
    "train": "api",
}

__all__ = [
    "CaptureConfig",
    "ColdstillError",
    "DistillTrainer",
    "TrainConfig",
    "__version__",
    "capture",
    "evaluate",
    "load_logit_dataset",
    "open_dataset",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
