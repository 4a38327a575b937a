"""Measuring a student: a model and batches of a logit dataset come in, an `EvaluationReport` goes out."""

from __future__ import annotations

from .evaluate import evaluate_student
from .report import EvaluationReport
from .tail_draws import draws_per_position

__all__ = ["EvaluationReport", "draws_per_position", "evaluate_student"]
