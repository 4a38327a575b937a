"""`report.html`: the page of one run. It runs no script and loads nothing; a running run's page reads itself again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib import resources

from coldstill.common.charts import Chart, Line, chart_figure, figure
from coldstill.common.clock import duration, ends_about
from coldstill.common.page import escaped, page_without_script

from .record import RunRecord

RELOAD_S = 30
MOST_SECTIONS = 16
"""Most lists of facts, one for each dataset."""
MOST_ROWS = 160
"""Most rows of a list of facts or of a table."""
MOST_MEASURED = 40
"""Most figures of evaluations."""

LOGGED = (
    ("Loss", "loss", "nats/target", None, None),
    ("KL to the teacher", "bucket_kl", "nats/target", 0.0, None),
    ("t of TAID", "taid_t", "share of the teacher", 0.0, 1.0),
    ("Learning rate", "learning_rate", "", 0.0, None),
    ("Gradient norm", "grad_norm", "before clipping", 0.0, None),
    ("Speed", "targets_per_s", "targets/s", 0.0, None),
    ("Peak memory", "peak_memory_mb", "MiB", 0.0, None),
)
"""Title, name in the log, unit and ends of the y axis of each chart."""
NOISY = frozenset({"loss", "bucket_kl", "grad_norm", "targets_per_s"})
"""Those that are drawn with their moving mean."""

NOTES = {
    "bucket_kl": "Over the kept ids, with all others as one.",
    "targets_per_s": "Target positions of all devices, checkpoints and evaluations included.",
    "peak_memory_mb": "Highest so far: of the GPU if there is one, else of the process.",
}
_MOVING_TARGET = "The target moves to the teacher with t, so the loss can rise while the KL falls."
CHARTED = (
    "loss",
    "cross_entropy",
    "forward_kl",
    "forward_kl_estimate",
    "forward_kl_lower_bound",
    "reverse_kl",
    "reverse_kl_lower_bound",
    "accuracy",
    "top1_agreement",
    "expected_calibration_error",
)
"""Figures of evaluations that have a chart, if they change; the last values of all of them are listed."""
_UNMEASURED = ("_runtime", "_per_second")


def charts_style() -> str:
    """The style of charts, cards and tables."""
    return (resources.files("coldstill.common") / "charts.css").read_text(encoding="utf-8")


def run_page(record: RunRecord, *, name: str, now: datetime) -> str:
    """The page of the run `name` as text. `now`: the local time at which it is written."""
    running = record.state == "running"
    body = [
        "<main>",
        _header(record, name=name, now=now),
        f'<section><div class="charts">{all_charts({name: record})}</div></section>',
        *_measured(record, name),
        f"<h2>Dataset, student, settings</h2>{_facts(record)}",
        "</main>",
    ]
    return page_without_script(
        "\n".join(body), title=f"{name} · training", style=charts_style(), reload_s=RELOAD_S if running else None
    )


def all_charts(records: Mapping[str, RunRecord]) -> str:
    """The charts of what is logged at each step, with one line per run; charts without any value are left out."""
    found = []
    for title, key, unit, low, high in LOGGED:
        note = NOTES.get(key, "")
        if key == "loss" and any(record.points("taid_t") for record in records.values()):
            note = _MOVING_TARGET
        found.append(_chart(records, key, Chart(title, unit, (), low=low, high=high, note=note)))
    return "".join(found)


def measured_names(records: Iterable[RunRecord]) -> list[str]:
    """Names of the figures of evaluations in the logs, without how long they took: at most `MOST_MEASURED`, because
    each is searched in the whole log."""
    names = dict.fromkeys(name for record in records for name in record.names("eval_"))
    return [name for name in names if not name.endswith(_UNMEASURED)][:MOST_MEASURED]


def measured_charts(records: Mapping[str, RunRecord]) -> str:
    """The charts of the evaluations on held-out rows during training."""
    found = []
    for name in measured_names(records.values()):
        if name.removeprefix("eval_") not in CHARTED:
            continue
        if len({y for record in records.values() for _, y in record.points(name)}) > 1:
            chart = Chart(name.removeprefix("eval_").replace("_", " "), "held out", ())
            found.append(_chart(records, name, chart, dots=True))
    return "".join(found)


def _chart(records: Mapping[str, RunRecord], key: str, chart: Chart, *, dots: bool = False) -> str:
    lines = [
        Line(name, points, color=color, dots=dots, noisy=key in NOISY)
        for color, (name, record) in enumerate(records.items())
        if (points := record.points(key))
    ]
    if not lines:
        return ""
    marks = next(iter(records.values())).resumed if len(records) == 1 else ()
    most = max(max(record.max_steps if len(records) == 1 else record.step, 1) for record in records.values())
    x_end = max(most, *(line.points[-1][0] for line in lines))
    full = Chart(chart.title, chart.unit, lines, low=chart.low, high=chart.high, note=chart.note, marks=marks)
    return chart_figure(full, x_name="optimizer step", x_end=x_end)


def _measured(record: RunRecord, name: str) -> list[str]:
    names = measured_names([record])
    if not names:
        return []
    last = _card("Last evaluation", [(one.removeprefix("eval_").replace("_", " "), record.last(one)) for one in names])
    return [
        "<h2>Evaluation on held-out rows</h2>",
        f'<div class="charts">{measured_charts({name: record})}</div><div class="facts">{last}</div>',
    ]


def _header(record: RunRecord, *, name: str, now: datetime) -> str:
    badge = f'<span class="badge{" failed" if record.state == "failed" else ""}">{record.state}</span>'
    figures = {"step": f"{record.step:,} <small>of {record.max_steps:,}</small>"}
    for title, key, unit in (
        ("loss", "loss", "nats"),
        ("KL to the teacher", "bucket_kl", "nats"),
        ("t", "taid_t", ""),
        ("speed", "targets_per_s", "targets/s"),
        ("peak memory", "peak_memory_mb", "MiB"),
    ):
        value = record.last(key)
        if value is not None:
            figures[title] = f"{figure(value)} <small>{unit}</small>"
    if record.state == "running" and record.time_left_s is not None:
        figures["time left"] = escaped(duration(record.time_left_s))
        figures["ends"] = escaped(ends_about(record.time_left_s, now=now))
    wall = record.summary.get("wall_s")
    if isinstance(wall, int | float):
        figures["training time"] = escaped(duration(wall))
    listed = "".join(f"<div><dt>{title}</dt><dd>{text}</dd></div>" for title, text in figures.items())
    resumed = f" · resumed at step {', '.join(f'{step:,}' for step in record.resumed[-8:])} (dashed)"
    said = f"Written {now:%Y-%m-%d %H:%M}{resumed if record.resumed else ''}"
    if record.state == "running":  # a SIGKILL lets nothing be written
        gap = record.longest_gap_s
        said += "" if gap is None else f", with at most {duration(gap)} between two writes so far"
        said += ". If that is long ago and the training is gone, it was killed: re-run its command to resume"
    kind = "failed" if record.state == "failed" else "quiet"
    error = f'<p class="{kind} written">{escaped(record.error, most=1000)}</p>' if record.error else ""
    return (
        f'<header><p class="quiet">Training run {badge}</p><h1>{escaped(name)}</h1>'
        f'<dl class="figures">{listed}</dl>{error}<p class="quiet written">{escaped(said)}. The x axes count optimizer '
        "steps; thin lines are the values of the log, thick ones their moving mean.</p></header>"
    )


def _facts(record: RunRecord) -> str:
    cards = [_card(title, section.items()) for title, section in list(record.facts.items())[:MOST_SECTIONS]]
    settings = {key: setting_text(value) for key, value in record.settings.items()}
    changed = [(key, settings.get(key, "")) for key in record.changed]
    cards.append(_card("Settings that differ from the defaults", changed or settings.items()))
    everything = _card("All settings", settings.items()) if changed else ""
    more = f"<details><summary>All settings</summary>{everything}</details>" if everything else ""
    return f'<div class="facts">{"".join(cards)}</div>{more}'


def _card(title: str, facts: Iterable[tuple[str, object]]) -> str:
    rows = [f"<dt>{escaped(name)}</dt><dd>{escaped(as_text(value))}</dd>" for name, value in facts]
    listed = "".join(rows[:MOST_ROWS])
    return f'<section class="card"><h3>{escaped(title)}</h3><dl>{listed}</dl></section>'


def as_text(value: object) -> str:
    """A figure or a fact as text."""
    if isinstance(value, bool) or value is None:
        return setting_text(value)
    if isinstance(value, float):
        return figure(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def setting_text(value: object) -> str:
    """A setting as it is written in a configuration: all its digits."""
    return json.dumps(value) if isinstance(value, bool | None) else str(value)
