"""Runs benchmark tasks of EleutherAI's lm-evaluation-harness on a student.

A task is a name that the library knows, or a YAML file in its format, whose data may be local.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coldstill.common.packages import require_packages
from coldstill.trainer.errors import TaskFailed

from .measured_model import measuring


def require_tasks() -> None:
    """Raise `PackagesMissing` if the library is not installed."""
    require_packages("eval", "lm_eval")


def evaluate_tasks(model: Any, tokenizer: Any, tasks: Sequence[str], *, batch_size: int) -> dict[str, float]:
    """Values by `task/metric`, for each metric of each of `tasks` and of the members of task groups.

    `tokenizer` is one of transformers. lm-eval seeds the generators of Python, numpy and torch.

    Raises `PackagesMissing`, `TaskFailed`.
    """
    require_tasks()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    try:
        # The library's thousands of tasks are indexed only if one of `tasks` may be among them.
        manager = TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))
        with measuring(model):
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
    # A task is third-party code and data: its exceptions are not bugs of Coldstill.
    except Exception as error:
        raise TaskFailed(
            f"tasks {', '.join(tasks)}",
            found=f"{type(error).__name__}: {error}",
            wanted="task names of lm-eval or YAML files in its format, with data that can be loaded",
            fix="list the names with `lm-eval ls tasks`; check a file with `lm-eval validate --tasks FILE`",
        ) from error
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        # A metric's name includes its filter, as in `acc,none`. Standard errors are skipped.
        if "," in metric and "_stderr," not in metric
    }
