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
    steps = config.training.max_steps
    if steps is None:
        batch = config.training.batch_size * config.training.gradient_accumulation_steps
        datasets = 1 if not config.start_datasets else len(config.start_datasets) + 1
        steps = math.ceil(rows * config.training.epochs / batch) if datasets == 1 else None
    return {
        **{part.title: part.words for part in parts},
        "prompts": found.sequences,
        **{f"rejected: {reason}": count for reason, count in found.rejected.items()},
        "answers of a round": rows,
        "targets of a round, at most": found.targets,
        "bytes of the answers of a round, at most": found.bytes_most,
        "bytes of the scores of a round, at most": round(found.targets * most_bytes_per_target(scores))
        + found.bytes_most,
        "optimizer steps of the first round": "not known: start_datasets have rows too" if steps is None else steps,
    }
