"""`coldstill stats` on the terminal: tables of at most 80 columns. They show no text of the dataset."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coldstill.common.visible import counted
from coldstill.tools.stats.histogram import Histogram
from coldstill.tools.stats.measure import Stats

FIGURES = ("mean", "p1", "median", "p99")
"""The column heads of `figures_of`."""

_BAR = 24

NAMES = {
    "entropy": "entropy, lower bound, nats",
    "tail_mass": "tail mass",
    "label_logprob": "log-prob of the label, nats",
    "kept_ids": "kept ids per target",
    "draws": "stored draws per target",
    "row_tokens": "tokens per row",
    "row_targets": "targets per row",
    "row_media": "images per row",
}
"""The histograms of `Stats` whose mean is shown, and their titles."""


def shown_names(stats: Stats) -> dict[str, str]:
    """`NAMES` without what a dataset of text does not have."""
    return {key: title for key, title in NAMES.items() if stats.media or key != "row_media"}


def show_stats(stats: Stats, *, console: Console) -> None:
    """Print the totals, the figures of each histogram, the ranks of labels and the bytes per target by column."""
    console.print(_totals(stats))
    console.print()
    console.print(_figures(stats))
    console.print()
    console.print(_bars("rank of the label among the kept ids", rank_shares(stats), as_number=_percent))
    console.print()
    console.print(_bars("bytes per target", bytes_per_target(stats), as_number="{:,.2f}".format))


def images_in_words(stats: Stats) -> str:
    """Number, types and bytes of the images."""
    types = ", ".join(f"{count:,} {kind.removeprefix('image/')}" for kind, count in stats.media_types.items())
    return f"{stats.media:,} ({types}), {stats.media_bytes:,} bytes"


def rank_shares(stats: Stats) -> dict[str, float]:
    """Share of the targets by rank of their label: `1`, `2`, `3-4`, ..., `not kept`; empty without targets."""
    if not stats.targets:
        return {}
    ranks = {span(item.start, item.stop): item.values / stats.targets for item in stats.label_rank.bins}
    return {**ranks, "not kept": stats.label_rank.outside / stats.targets}


def bytes_per_target(stats: Stats) -> dict[str, float]:
    """Bytes per target by column, the largest first, without images; empty without targets."""
    if not stats.targets:
        return {}
    ordered = sorted(stats.column_bytes.items(), key=lambda item: -item[1])
    return {name: size / stats.targets for name, size in ordered if not (name == "media" and stats.media)}


def span(start: float, stop: float) -> str:
    """The whole numbers of a bin, as text: `7` or `9-16`."""
    return f"{start:,.0f}" if stop - start == 1 else f"{start:,.0f}-{stop - 1:,.0f}"


def figure(value: float | None) -> str:
    """Four significant digits; `-` for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def figures_of(histogram: Histogram) -> tuple[str, ...]:
    """Mean, 1st percentile, median and 99th percentile, as text."""
    return tuple(map(figure, (histogram.mean, histogram.p01, histogram.p50, histogram.p99)))


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _totals(stats: Stats) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in (
        ("rows", f"{stats.rows:,} in {counted(stats.shards, 'shard')}; {stats.rejected:,} source rows rejected"),
        ("tokens", f"{stats.tokens:,}"),
        ("targets", f"{stats.targets:,}"),
        ("size", f"{stats.bytes:,} bytes, {figure(stats.bytes_per_target)} per target"),
        *([("images", images_in_words(stats))] if stats.media else []),
        ("label kept", "-" if stats.label_kept is None else f"at {_percent(stats.label_kept)} of the targets"),
    ):
        table.add_row(name, Text(value))
    return table


def _figures(stats: Stats) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", width=28)
    for name in FIGURES:
        table.add_column(name, justify="right", width=10)
    for key, title in shown_names(stats).items():
        table.add_row(title, *figures_of(getattr(stats, key)))
    return table


def _bars(title: str, values: dict[str, float], *, as_number: Callable[[float], str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(title, width=max(17, len(title)))
    table.add_column("", justify="right", width=9)
    table.add_column("", width=_BAR)
    most = max(values.values(), default=0)
    for name, value in values.items():
        table.add_row(name, as_number(value), Text("▇" * round(_BAR * value / most) if most else "", style="dim"))
    return table
