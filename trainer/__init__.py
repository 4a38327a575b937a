"""The student's half: a logit dataset comes in, a trained student goes out; no teacher in memory.

    from transformers import AutoModelForCausalLM, TrainingArguments
    from trainer import DistillTrainer, load_logit_dataset

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    DistillTrainer(model, TrainingArguments("out"), train_dataset=load_logit_dataset("data/qwen2.5-7b")).train()

The names are loaded when they are first asked for, so that the command line can read `trainer.config` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LossConfig
    from .data import LogitDataset, load_logit_dataset
    from .distill_trainer import DistillTrainer
    from .evaluation import EvaluationReport, evaluate_student

__all__ = [
    "DistillTrainer",
    "EvaluationReport",
    "LogitDataset",
    "LossConfig",
    "evaluate_student",
    "load_logit_dataset",
]

_PLACES = {
    "DistillTrainer": "distill_trainer",
    "EvaluationReport": "evaluation",
    "LogitDataset": "data",
    "LossConfig": "config",
    "evaluate_student": "evaluation",
    "load_logit_dataset": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
