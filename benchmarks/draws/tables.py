"""Tables that several commands print: noise of rules, and shares of sides."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.draws.grid import Lines, kls_of, shares_of


def print_noise(title: str, lines: Iterable[dict[str, Any]], *, of: str) -> None:
    """One row for each line of noise; its first column is the line's value of `of`."""
    table = Table(of, "K", "D", "rule", "bytes", "logits", "hidden", "head", title=f"noise x 1000, {title}")
    for line in lines:
        rule, noise = line["rule"], (f"{1000 * line[name]:.2f}" for name in ("logits", "hidden", "head"))
        name = rule["name"] + (", control variate" if line["control"] else "")
        table.add_row(line[of], str(rule["top_k"]), str(rule["draws"]), name, f"{line['bytes']:.1f}", *noise)
    Console().print(table)


def print_shares(runs: Lines) -> None:
    """One table for each teacher: held-out KL and share of dense TAID's gain, means over seeds, with the extremes."""
    kls = kls_of(runs)
    for teacher, of_sides in shares_of(runs).items():
        table = Table("side", "runs", "held-out KL", "share", "lowest", "highest", title=f"teacher {teacher}")
        for side, values in of_sides.items():
            kl = statistics.mean(kls[teacher][side].values())
            shares = (f"{share:.3f}" for share in (statistics.mean(values), min(values), max(values)))
            table.add_row(side, str(len(values)), f"{kl:.4f}", *shares)
        Console().print(table)
