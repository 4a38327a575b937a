"""Benchmarks of lm-eval: a model, its tokenizer and tasks come in, a number per metric goes out.

The library is EleutherAI's lm-evaluation-harness; here is only how it is called. A task is one of its names, or a YAML
file of its format, whose data may be local.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coldstill.common.packages import require_packages
from coldstill.trainer.errors import TaskFailed

from .evaluate import measuring


def require_tasks() -> None:
    """Raise `PackagesMissing` where the library is not installed."""
    require_packages("eval", "lm_eval")


def evaluate_tasks(model: Any, tokenizer: Any, tasks: Sequence[str], *, batch_size: int) -> dict[str, float]:
    """`task/metric` and its value, for each metric of each of `tasks`, and of the members of groups.

    `tokenizer` is transformers'. lm-eval seeds the generators of Python, numpy and torch. Raises `PackagesMissing`,
    `TaskFailed`.
    """
    require_tasks()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    try:
        # The library's own thousands of tasks are only looked through where one of them may be meant.
        manager = TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))
        with measuring(model):
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
    # A task is code and data of somebody else: what it raises is no defect of ours.
    except Exception as error:
        raise TaskFailed(
            f"tasks {', '.join(tasks)}",
            found=f"{type(error).__name__}: {error}",
            wanted="names of lm-eval, or YAML files of its format, with data that can be reached",
            fix="run `lm-eval ls tasks` for the names, `lm-eval validate` for a file",
        ) from error
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        # A metric is named with its filter, as `acc,none`; standard errors were not asked for.
        if "," in metric and "_stderr," not in metric
    }
