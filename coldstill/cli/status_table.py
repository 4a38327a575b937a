"""The status of a capture or of rounds as a table on the terminal, printed once or refreshed."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coldstill.common.clock import duration, ends_about, local_now
from coldstill.common.visible import NEWLINE, visible
from coldstill.pipeline.driver.status import MEANING, Status
from coldstill.rounds.parts import HEADINGS
from coldstill.rounds.status import MEANING as MEANING_OF_ROUNDS
from coldstill.rounds.status import RoundsStatus

MOST_SHOWN = 10
"""Failed units and workers that the tables list at most; `--json` lists all of them."""


AnyStatus = Status | RoundsStatus


def show_status(status: AnyStatus, *, console: Console, now: datetime | None = None) -> None:
    """Print the status once. `now`: the local time, by default that of the clock."""
    console.print(_view(status, now=now))


def watch_status(read: Callable[[], AnyStatus], *, every_s: float, console: Console) -> AnyStatus:
    """Refresh the status every `every_s` seconds until what it shows is over; return the last one."""
    status = read()
    with Live(_view(status), console=console, auto_refresh=False) as live:
        while not status.is_over:
            time.sleep(every_s)
            status = read()
            live.update(_view(status), refresh=True)
    return status


def _view(status: AnyStatus, *, now: datetime | None = None) -> RenderableType:
    """`now`: the local time, by default that of the clock."""
    if isinstance(status, RoundsStatus):
        return _view_of_rounds(status, now or local_now())
    table = Table(title=_plain(status.root), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(status, now or local_now()):
        table.add_row(name, _plain(value))
    lists = [_failed(status)] * bool(status.failed) + [_running(status)] * bool(status.running)
    return Group(table, *lists)


def _view_of_rounds(status: RoundsStatus, now: datetime) -> RenderableType:
    table = Table(title=_plain(status.root), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("state", f"{status.state}: {MEANING_OF_ROUNDS[status.state]}")
    table.add_row("rounds", f"{status.rounds_done} of {status.rounds} done")
    if status.part is not None:
        table.add_row("now", f"round-{status.round:02}/{status.part}: {HEADINGS[status.part]}")
    if status.steps_done is not None:
        table.add_row("checkpoint", f"step {status.steps_done:,}")
    if status.training is not None:
        table.add_row("training", f"step {status.training.step:,} of {status.training.max_steps:,}")
        if not status.is_over:
            table.add_row("time left", f"{duration(status.training.time_left_s)}, of this part")
            table.add_row("part ends", ends_about(status.training.time_left_s, now=now))
    if status.student is not None:
        table.add_row("newest student", _plain(status.student))
    return Group(table, *([_view(status.capture, now=now)] if status.capture else []))


def _lines(status: Status, now: datetime) -> list[tuple[str, str]]:
    totals = status.totals
    lines = [("state", f"{status.state}: {MEANING[status.state]}")]
    if status.error:
        lines.append(("stopped by", status.error))
    if status.driver:
        lines.append(("driver", status.driver.removeprefix("the driver with ")))
    lines += [
        ("units", f"{status.units_done:,} of {_count(status.units_planned)} done"),
        ("", f"{status.units_running:,} running, {status.units_failed:,} failed"),
        ("rows", f"{_count(status.rows_done)} of {_count(status.rows_planned)}{_share(status)}"),
        *(("rejected", f"{count:,} {reason}") for reason, count in sorted(status.rejected.items())),
        ("tokens", f"{totals.tokens:,}, of which {totals.targets:,} targets"),
        ("shards", f"{totals.bytes:,} bytes"),
    ]
    if status.teacher_saw:
        lines.append(("teacher saw", status.teacher_saw))
    if not status.is_over:
        lines += [
            ("workers", f"{status.workers:,} ready"),
            ("speed", f"{status.tokens_per_s:,.0f} tokens/s" if status.tokens_per_s else duration(None)),
            ("time left", duration(status.time_left_s)),
            ("ends", ends_about(status.time_left_s, now=now)),
        ]
    if totals.starts:
        worker_hours, gpu_hours = totals.worker_seconds / 3600, totals.gpu_seconds / 3600
        price = "" if totals.cost is None else f", cost {totals.cost:,.2f}"
        starts = "1 start" if totals.starts == 1 else f"{totals.starts:,} starts"
        lines.append(("so far", f"{starts}, {worker_hours:,.2f} worker-hours"))
        lines.append(("", f"{gpu_hours:,.2f} GPU-hours{price}"))
    if status.dataset_id:
        lines.append(("dataset id", status.dataset_id))
    return lines


def _plain(text: str, *, newline: str = NEWLINE) -> Text:
    """Text from the directory as plain text: neither escape sequences nor style markup reach the terminal."""
    return Text(visible(text, newline=newline))


def _share(status: Status) -> str:
    return f" ({status.rows_done / status.rows_planned:.1%})" if status.rows_done and status.rows_planned else ""


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _failed(status: Status) -> Table:
    table = Table("unit", "why it failed", title="failed units", title_justify="left")
    for failure in status.failed[:MOST_SHOWN]:
        table.add_row(str(failure.unit), _plain(failure.reason, newline="\n"))
    if status.units_failed > MOST_SHOWN:
        table.add_row("...", f"{status.units_failed - MOST_SHOWN:,} more")
    return table


def _running(status: Status) -> Table:
    table = Table("worker", "units", title="running", title_justify="left")
    workers: dict[str, list[int]] = {}
    for unit, worker in sorted(status.running.items()):
        workers.setdefault(worker, []).append(unit)
    for worker, units in sorted(workers.items())[:MOST_SHOWN]:
        table.add_row(_plain(worker), ", ".join(map(str, units)))
    if len(workers) > MOST_SHOWN:
        table.add_row("...", f"{len(workers) - MOST_SHOWN:,} more")
    return table
