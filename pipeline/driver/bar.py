"""The driver's progress bar: rows, with what the run is worth a look at beside it."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm

from coldstill.pipeline.units.worker import UnitReport

from .progress import Progress, Work


class DriverBar:
    """Rows of the source as units end; refreshed each second, for workers come and go between two units."""

    def __init__(self, progress: Progress, *, work: Work, rows: int, rows_done: int):
        self._progress, self._work = progress, work
        self._bar = tqdm(total=rows, initial=rows_done, desc="capture", unit=" rows", smoothing=0)
        self._has_begun = False

    def __enter__(self) -> DriverBar:
        self._progress.on_second = self._refresh
        self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.on_second = None
        self._bar.close()

    def add(self, report: UnitReport) -> None:
        """A unit ended."""
        self._bar.update(report.rows + report.rejected)
        self._refresh()

    def _refresh(self) -> None:
        if self._work.workers and not self._has_begun:
            self._has_begun = True
            self._bar.unpause()  # the start of engines says nothing about the time that is left
        self._bar.set_postfix_str(self._words())

    def _words(self) -> str:
        if not self._has_begun:
            return "starting workers"
        rates, totals, failed = self._progress.rates, self._progress.totals, len(self._work.failed)
        words = [f"{rates.targets:,.0f} targets/s"] if rates else []
        words.append(f"workers: {self._work.workers}")
        words += [f"failed: {failed}"] if failed else []
        words += [f"cost: {totals.cost:,.2f}"] if totals.cost is not None else []
        return ", ".join(words)
