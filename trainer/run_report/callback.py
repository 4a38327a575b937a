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
from coldstill.common.files import PAGE_NAME, new_file
from coldstill.trainer.errors import LoaderWorkerDied
from coldstill.trainer.interruption import naming_dead_workers

from .facts import RunFacts
from .pace import Pace
from .page import run_page
from .record import RECORD_NAME, RunRecord, State, read_run, spread

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
        output: str | Path,
        facts: Callable[[], RunFacts],
        *,
        write: bool,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = local_now,
    ):
        """`facts`: reads what the page says of the run. `write`: whether this process writes, the first of all.
        `clock`: seconds; `now`: the local time."""
        self._output, self._writes, self._clock, self._now = Path(output), write, clock, now
        self._pace = Pace(clock)
        self._time_left_s: float | None = None
        self._state: Any = None
        self._facts = RunFacts()
        self._resumed: tuple[int, ...] = ()
        self._next_s, self._has_failed, self._is_training = 0.0, False, False
        self._last_s: float | None = None
        self._longest_gap_s: float | None = None
        if write:
            with self._harmless():
                self._facts = facts()

    def __enter__(self) -> RunReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._is_training = False
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
        self._state, self._is_training = state, True
        if not self._writes:
            return
        with self._harmless():
            if state.global_step:
                self._resumed = (*self._earlier_resumes(before=state.global_step), state.global_step)
            if model is not None:
                weights = list(model.parameters())
                trained = sum(weight.numel() for weight in weights if weight.requires_grad)
                self._facts.sections.setdefault("Student", {}).update(
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
        """Write, unless the last time was a moment ago. An evaluation after the training is none of its steps."""
        with self._harmless():
            if self._writes and self._is_training and self._clock() >= self._next_s:
                self._write("running")

    def finish(self, state: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Write the report of the finished run from the `trainer_state.json` of its last checkpoint."""
        self._is_training = False
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
            longest_gap_s=self._longest_gap_s,
            step=step,
            max_steps=max(total, 0),
            time_left_s=self._time_left_s if kind == "running" else None,
            facts=self._facts.sections,
            settings=self._facts.settings,
            changed=self._facts.changed,
            resumed=self._resumed,
            log=tuple(dict(line) for line in spread(log)),
            **more,
        )

    def _put(self, kind: State, step: int, total: int, log: Sequence[Mapping[str, Any]], **more: Any) -> None:
        if not self._writes:
            return
        began = self._clock()
        if self._last_s is not None:
            self._longest_gap_s = max(self._longest_gap_s or 0.0, began - self._last_s)
        self._last_s = began
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
