"""Several runs side by side: what differs, how they ended, and a page with their curves.

`coldstill compare` prints it. Works on unfinished runs, from the last report of each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from coldstill.common.charts import COLORS
from coldstill.common.clock import duration, moment
from coldstill.common.page import escaped, page_without_script
from coldstill.trainer.errors import EvaluationNotOfRun

from .page import (
    MOST_MEASURED,
    MOST_ROWS,
    all_charts,
    as_text,
    charts_style,
    measured_charts,
    measured_names,
    setting_text,
)
from .record import RunRecord, json_object, numbers, read_run

EVALUATIONS = "evaluation*.json"
"""Reports of `coldstill evaluate --json` in the folder of a run."""


@dataclass(frozen=True)
class Comparison:
    """Runs by their name, the shortest that tells them apart, with their folders and evaluations."""

    runs: dict[str, RunRecord]
    folders: dict[str, Path]
    evaluations: dict[str, dict[str, float]]

    def differing_settings(self) -> dict[str, list[Any]]:
        """The settings that are not equal in all runs, with the value of each run; None where it is not known.

        Only a setting of the loss that a run lacks counts as another value: each loss has its own, and the record of a
        run of an earlier release lacks many.
        """
        runs = self.runs.values()
        found = {}
        for name in dict.fromkeys(name for record in runs for name in record.settings):
            known = [record.settings[name] for record in runs if name in record.settings]
            is_of_loss = name.startswith("loss.") and len(known) < len(runs) and any(one is not None for one in known)
            if is_of_loss or any(value != known[0] for value in known):
                found[name] = [record.settings.get(name) for record in runs]
        return found

    def facts(self) -> dict[str, list[str | None]]:
        """Dataset, teacher and student of each run."""
        found: dict[str, list[str | None]] = {}
        for title, name in (
            ("dataset", "path"),
            ("dataset id", "dataset id"),
            ("teacher", "teacher"),
            ("student", "model"),
            ("parameters", "parameters"),
        ):
            values = ["; ".join(_facts(record, name)) or None for record in self.runs.values()]
            if any(values):
                found[title] = values
        return found

    def figures(self) -> dict[str, list[float | str | None]]:
        """What each run reached. `loss` and `KL` are means of the last tenth of its log, in nats per target."""
        runs = list(self.runs.values())
        found: dict[str, list[float | str | None]] = {
            "state": [record.state for record in runs],
            # A run that was killed says `running` for ever: the time tells.
            "last written": [moment(record.written) if record.state == "running" else None for record in runs],
            "longest time between writes": [
                duration(record.longest_gap_s) if record.state == "running" and record.longest_gap_s else None
                for record in runs
            ],
            "step": [f"{record.step:,} of {record.max_steps:,}" for record in runs],
            "loss": [record.late("loss") for record in runs],
            "KL to the teacher": [record.late("bucket_kl") for record in runs],
            "t": [record.last("taid_t") for record in runs],
            "targets/s": [_of(record, "targets_per_s", record.late("targets_per_s")) for record in runs],
            "peak memory, MiB": [_of(record, "peak_memory_mb", record.last("peak_memory_mb")) for record in runs],
            "training time": [duration(_of(r, "wall_s", None)) if "wall_s" in r.summary else None for r in runs],
        }
        for name in measured_names(runs):
            found[name.replace("_", " ")] = [record.last(name) for record in runs]
        for name in list(dict.fromkeys(name for one in self.evaluations.values() for name in one))[:MOST_MEASURED]:
            found[f"evaluate: {name.replace('_', ' ')}"] = [self.evaluations[run].get(name) for run in self.runs]
        return {name: values for name, values in found.items() if any(value is not None for value in values)}

    def tables(self) -> dict[str, dict[str, list[str]]]:
        """What people read: titles of tables, with the text of each cell. A long table ends with the number of rows
        that it leaves out."""
        found = {}
        for title, rows, text in (
            ("Figures", self.figures(), as_text),
            ("Settings that differ", self.differing_settings(), setting_text),
            ("Dataset, teacher, student", self.facts(), as_text),
        ):
            shown = {
                name: ["" if value is None else text(value) for value in values]
                for name, values in list(rows.items())[:MOST_ROWS]
            }
            if len(rows) > MOST_ROWS:
                shown[f"and {len(rows) - MOST_ROWS:,} more"] = [""] * len(self.runs)
            if shown:
                found[title] = shown
        return found

    def document(self) -> dict[str, Any]:
        """All of it as JSON values."""
        figures, facts = self.figures(), self.facts()
        runs = [
            {
                "name": name,
                "folder": str(self.folders[name]),
                **{title: values[place] for title, values in figures.items()},
                **{title: values[place] for title, values in facts.items()},
            }
            for place, name in enumerate(self.runs)
        ]
        return {"runs": runs, "differing_settings": self.differing_settings()}


def read_runs(folders: Sequence[Path], *, evaluations: Sequence[Path] = ()) -> Comparison:
    """The runs in `folders`, with the reports of `coldstill evaluate` in them and those in `evaluations`.

    Raises what `read_run` raises, `RunDamaged` for a report that is none, and `EvaluationNotOfRun`.
    """
    folders = list(dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders))  # also of a loop of links
    names = dict(zip(short_names(folders), folders, strict=True))
    runs = {name: read_run(folder) for name, folder in names.items()}
    found: dict[str, dict[str, float]] = {name: {} for name in runs}
    for name, folder in names.items():
        for path in sorted(folder.glob(EVALUATIONS)):
            found[name] |= _measured(_report(path))
    for path in evaluations:
        report = _report(path)
        student = Path(os.path.realpath(str(report.get("student", "")).replace("\0", "")))
        name = next((name for name, folder in names.items() if student.is_relative_to(folder)), "")
        if not name:
            raise EvaluationNotOfRun(
                f"{path}: student",
                found=report.get("student"),
                wanted="a path below " + " or ".join(map(str, folders)),
                fix="evaluate RUN/student, or copy the report into its run as evaluation.json",
            )
        found[name] |= _measured(report)
    return Comparison(runs, names, found)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart."""
    for count in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        names = [str(Path(*folder.parts[-count:])) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def comparison_page(comparison: Comparison, *, now: datetime) -> str:
    """The page of the runs as text. `now`: the local time at which it is written."""
    runs = comparison.runs
    legend = "".join(f"<li>{_key(place)}{escaped(name)}</li>" for place, name in enumerate(runs))
    measured = measured_charts(runs)
    written = (
        f'<p class="quiet">Written {now:%Y-%m-%d %H:%M}. The x axes count optimizer '
        "steps; thin lines are the values of the log, thick ones their moving mean. Losses of different kinds do not "
        "compare: the KL does.</p></header>"
    )
    body = [
        '<main><header><p class="quiet">Comparison</p>',
        f"<h1>{len(runs)} training run{'s' * (len(runs) != 1)}</h1>",
        f'<ul class="legend">{legend}</ul>',
        written,
        f'<section><div class="charts">{all_charts(runs)}</div></section>',
        f'<h2>Evaluation on held-out rows</h2><div class="charts">{measured}</div>' if measured else "",
        *(_table(title, rows, runs) for title, rows in comparison.tables().items()),
        "</main>",
    ]
    return page_without_script("\n".join(body), title="Comparison of training runs", style=charts_style())


def _table(title: str, rows: Mapping[str, Sequence[str]], runs: Mapping[str, RunRecord]) -> str:
    head = "".join(f"<th>{_key(place)}{escaped(name)}</th>" for place, name in enumerate(runs))
    lines = [
        f"<tr><td>{escaped(name)}</td>{''.join(f'<td>{escaped(value)}</td>' for value in values)}</tr>"
        for name, values in rows.items()
    ]
    return (
        f'<h2>{escaped(title)}</h2><div class="card"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _key(place: int) -> str:
    return f'<span class="key line-{place % COLORS}{" dashed" if place >= COLORS else ""}"></span>'


def _facts(record: RunRecord, name: str) -> list[str]:
    return [section[name] for section in record.facts.values() if section.get(name)]


def _of(record: RunRecord, name: str, otherwise: float | None) -> float | None:
    return numbers(record.summary).get(name, otherwise)


def _measured(report: Mapping[str, Any]) -> dict[str, float]:
    """The first figures of a report, as many as are shown."""
    return dict(list(numbers(report).items())[:MOST_MEASURED])


def _report(path: Path) -> dict[str, Any]:
    return json_object(
        path,
        wanted="the JSON document of `coldstill evaluate --json`",
        fix="run `coldstill evaluate STUDENT DATASET --json` and store its output there",
    )
