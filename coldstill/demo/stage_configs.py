"""The settings that the demo hands to `coldstill capture` and `coldstill train`: what a user would write by hand."""

from __future__ import annotations

from typing import Any

from .settings import MAX_TOKENS, Layout, Size


def capture_config(layout: Layout, size: Size) -> dict[str, Any]:
    """Score the distillation part's pairs with the teacher under vLLM."""
    return {
        "output": str(layout.dataset),
        "source": {"path": str(layout.rows("distill", "pairs")), "loss_on": "assistant"},
        "teacher": {
            "model": str(layout.teacher),
            "engine": "vllm",
            "dtype": "float32",
            "top_k": size.top_k,
            "draws": size.draws,
            "max_length": MAX_TOKENS,
        },
        "rows_per_unit": size.rows_per_unit,
        "cluster": {"max_workers": 1},
    }


def train_config(layout: Layout, size: Size, *, loss: str) -> dict[str, Any]:
    """Train the student with one loss. All but the loss and the output is the same for all three runs."""
    return {
        "dataset": str(layout.dataset),
        "output": str(layout.run(loss)),
        "student": {"model": str(layout.student)},
        "loss": {"name": loss},
        "data": {"seed": 0},
        "training": {
            "learning_rate": size.learning_rate,
            "epochs": size.epochs,
            "batch_size": size.batch_size,
            "warmup_ratio": 0.05,
            "logging_steps": size.logging_steps,
            "save_steps": size.save_steps,
        },
    }
