"""The course of a run: the log of a `trainer_state.json` comes in, the text of `report.md` goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_LINES = 40
"""Lines of a table; longer logs are thinned out evenly, first and last stay."""
BARS = " ▁▂▃▄▅▆▇█"
COURSE = ("step", "epoch", "taid_t", "taid_momentum", "loss", "bucket_kl", "learning_rate", "grad_norm")


def run_report(log: Sequence[Mapping[str, Any]]) -> str:
    """The curve of t, the course of training, and the measurements on held-out rows."""
    course = [line for line in log if "loss" in line]
    measured = [line for line in log if "eval_loss" in line]
    text = ["# Course of the run", ""]
    t = [line["taid_t"] for line in course if "taid_t" in line]
    if t:
        text += [f"t from {t[0]:.3f} to {t[-1]:.3f}: `{_curve(t)}`", ""]
    text += _table(course, [name for name in COURSE if any(name in line for line in course)])
    if measured:
        names = [name for name in measured[0] if name.startswith("eval_")]
        text += ["", "## Held-out rows", "", *_table(measured, ["step", *names])]
    return "\n".join([*text, ""])


def _curve(values: Sequence[float]) -> str:
    """One character per value, from 0 to 1."""
    return "".join(BARS[round(value * (len(BARS) - 1))] for value in _thinned(values))


def _table(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    rows = [" | ".join(_cell(line.get(name)) for name in names) for line in _thinned(lines)]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *(f"| {row} |" for row in rows)]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _thinned(items: Sequence[Any]) -> list[Any]:
    if len(items) <= MOST_LINES:
        return list(items)
    return [items[round(n * (len(items) - 1) / (MOST_LINES - 1))] for n in range(MOST_LINES)]
