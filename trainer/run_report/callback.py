"""Writes `report.json` and `report.html` into the output of a run, while it runs and at each kind of end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from coldstill.common.clock import local_now
from coldstill.common.errors import ColdstillError, first_line, type_and_line
from coldstill.common.files import new_file
from coldstill.common.models import flat
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.errors import LoaderWorkerDied
from coldstill.trainer.interruption import naming_dead_workers

from .pace import Pace
from .page import run_page
from .record import PAGE_NAME, RECORD_NAME, RunRecord, State, read_run, spread, without_password

logger = logging.get_logger(__name__)

EVERY_S = 10.0
"""Least seconds between two writes during training."""
_SHARE = 0.01
"""Largest share of the training time that writes take."""


class RunReport(TrainerCallback):
    """The report of one run. As a context manager around the training, it also writes how the training ended.

    Whatever fails in it is logged, once, and does not end the training.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: LogitDataset,
        *,
        write: bool,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = local_now,
    ):
        """`write`: whether this process writes, the first of all. `clock`: seconds; `now`: the local time."""
        self._output, self._writes, self._clock, self._now = Path(config.output), write, clock, now
        self._pace = Pace(clock)
        self._time_left_s: float | None = None
        self._state: Any = None
        self._changed: tuple[str, ...] = ()
        self._settings: dict[str, Any] = {}
        self._facts: dict[str, dict[str, str]] = {}
        self._resumed: tuple[int, ...] = ()
        self._next_s, self._has_failed = 0.0, False
        with self._harmless():
            stated = flat(config.model_dump(mode="json", exclude_defaults=True))
            self._changed = tuple(name for name in stated if name != "output")
            settings = without_password(flat(config.model_dump(mode="json")))
            self._settings = {name: value for name, value in settings.items() if name != "output"}
            self._facts = facts_of(config, dataset)

    def __enter__(self) -> RunReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or self._state is None:
            return
        with self._harmless():
            if isinstance(error, KeyboardInterrupt | SystemExit):
                self._write("interrupted", error=first_line(error))
                return
            what = error.what if isinstance(error, ColdstillError) else first_line(error)
            self._write("failed", error=f"{type(error).__name__}: {what}")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Take over what the report of the earlier starts lists, and write the first page of this one."""
        self._state = state
        if not self._writes:
            return
        with self._harmless():
            if state.global_step:
                self._resumed = (*self._earlier_resumes(before=state.global_step), state.global_step)
            if model is not None:
                weights = list(model.parameters())
                trained = sum(weight.numel() for weight in weights if weight.requires_grad)
                self._facts.setdefault("Student", {}).update(
                    {
                        "parameters": f"{sum(weight.numel() for weight in weights):,}",
                        "trained parameters": f"{trained:,}",
                    }
                )
            self._write("running")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the pace."""
        self._time_left_s = self._pace.left_s(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write, unless the last time was a moment ago."""
        with self._harmless():
            if self._writes and self._clock() >= self._next_s:
                self._write("running")

    def finish(self, state: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Write the report of the finished run from the `trainer_state.json` of its last checkpoint."""
        with self._harmless():
            if self._state is None and self._writes:  # an earlier start took the last step
                self._resumed = self._earlier_resumes(before=int(state["global_step"]) + 1)
            step, total = int(state["global_step"]), int(state["max_steps"])
            self._put("finished", step, total, state["log_history"], summary=dict(summary))

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Log the first error of all such blocks. A dead process of the data loader, which torch raises in whatever
        code the main thread runs, still ends the training."""
        try:
            with naming_dead_workers():
                yield
        except LoaderWorkerDied:
            raise
        except Exception as error:
            if not self._has_failed:
                why = error.strerror if isinstance(error, OSError) else type_and_line(error)
                logger.warning(f"{self._output / PAGE_NAME} was not written ({why}); the training continues")
            self._has_failed = True

    def _write(self, kind: State, *, error: str | None = None) -> None:
        state = self._state
        self._put(kind, state.global_step, state.max_steps, state.log_history, error=error)

    def _record(self, kind: State, step: int, total: int, log: Sequence[Mapping[str, Any]], **more: Any) -> RunRecord:
        return RunRecord(
            state=kind,
            written=self._now().timestamp(),
            step=step,
            max_steps=max(total, 0),
            time_left_s=self._time_left_s if kind == "running" else None,
            facts=self._facts,
            settings=self._settings,
            changed=self._changed,
            resumed=self._resumed,
            log=tuple(dict(line) for line in spread(log)),
            **more,
        )

    def _put(self, kind: State, step: int, total: int, log: Sequence[Mapping[str, Any]], **more: Any) -> None:
        if not self._writes:
            return
        began = self._clock()
        try:
            record = self._record(kind, step, total, log, **more)
            page = run_page(record, name=self._output.resolve().name, now=self._now())
            for name, text in ((RECORD_NAME, record.model_dump_json()), (PAGE_NAME, page)):
                with new_file(self._output / name) as beside:
                    beside.write_text(text, encoding="utf-8")
        finally:  # also what fails takes its share of the time
            now = self._clock()
            self._next_s = now + max(EVERY_S, (now - began) / _SHARE)

    def _earlier_resumes(self, *, before: int) -> tuple[int, ...]:
        try:
            return tuple(step for step in read_run(self._output).resumed if step < before)
        except (ColdstillError, OSError):
            return ()


def facts_of(config: TrainConfig, dataset: LogitDataset) -> dict[str, dict[str, str]]:
    """Facts of each dataset with its teacher, and of the student, as text."""
    found: dict[str, dict[str, str]] = {}
    datasets = dataset.all_datasets
    for number, one in enumerate(datasets, start=1):
        header, manifest = one.header, one.manifest
        found["Dataset" if len(datasets) == 1 else f"Dataset {number}"] = {
            "path": without_password(one.store.url),
            "dataset id": one.dataset_id,
            "teacher": header.teacher.full_name + (f" @ {header.teacher.revision}" if header.teacher.revision else ""),
            **({"teacher saw": header.teacher_saw} if header.teacher_saw else {}),
            "rows": f"{manifest.rows:,}",
            "targets": f"{manifest.targets:,}",
            "kept": header.kept_in_words,
            "draws per position": f"{header.draws:,}",
            "license": header.about.license or "not stated",
        }
    found["Student"] = {"model": config.student.name, "loss": config.loss.name}
    return found
