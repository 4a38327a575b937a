"""Estimates rounds without running them: their parts, and the rows, targets and bytes of one round."""

from __future__ import annotations

import math
from typing import Any

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.dry_run import dry_run
from coldstill.pipeline.expected_bytes import most_bytes_per_target

from .config import RoundsConfig
from .run import checked_parts


def estimate_rounds(config: RoundsConfig) -> dict[str, Any]:
    """The commands of all parts, and upper limits of one round: the student's answers may be shorter.

    Reads all prompts once. Raises what `checked_parts` raises, and the named errors of source and student.
    """
    parts = checked_parts(config)
    answers, scores = (CaptureConfig.model_validate(part.settings) for part in parts[:2])
    found = dry_run(answers)
    rows = found.sequences * config.sampling.n
    return {
        **{part.title: part.words for part in parts},
        "prompts": found.sequences,
        **{f"rejected: {reason}": count for reason, count in found.rejected.items()},
        "answers of a round": rows,
        "targets of a round, at most": found.targets,
        "bytes of the answers of a round, at most": found.bytes_most,
        "bytes of the scores of a round, at most": round(found.targets * most_bytes_per_target(scores))
        + found.bytes_most,
        "optimizer steps of the first round": _steps(config, rows),
    }


def _steps(config: RoundsConfig, rows: int) -> int | str:
    """Optimizer steps on one device of a training on `rows` rows, or why they are not known."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    if config.start_datasets:
        return "not known: start_datasets have rows too"
    if training.pack_length is not None:
        return "not known: training.pack_length puts several rows into one, by their lengths"
    forward_passes = math.ceil(training.epochs * math.ceil(rows / training.batch_size))
    return math.ceil(forward_passes / training.gradient_accumulation_steps)
