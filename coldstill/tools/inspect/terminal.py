"""`coldstill inspect` on the terminal: a summary of a dataset, or one row token by token.

All text of the dataset passes `visible`, and none of it is interpreted as markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coldstill.common.visible import counted, visible
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER

from .row_facts import InspectedRow, open_row
from .row_media import shown_media
from .token_text import MAX_TOKENS, shortened

TOP = 5

LEVELS = (
    (0.1, "≥ 10%", ""),
    (0.01, "≥ 1%", "black on #f5d9a3"),
    (0.001, "≥ 0.1%", "black on #ea9c62"),
    (0.0, "less", "white on #a33c2e"),
)
"""Least probability of the actual token, its name in the legend, the token's color. Equal steps of surprise."""

_ENTRY_WIDE, _ENTRY_NARROW = 6, 3
"""Entries per line of the table: the top five and the actual token take one line or two."""

MAX_TARGETS = 4_096
"""Maximum number of targets in the table of a row: a terminal takes seconds for as many."""

_ROWS_PER_TABLE = 256
_MAX_NAME, _MAX_VALUE = 40, 300
"""Characters of a fact, and of the name of one that only a later release knows."""


def show_dataset(root: str | Path, *, console: Console) -> None:
    """Print a summary of the dataset at `root`. Raises what `open_dataset` raises."""
    dataset = open_dataset(root)
    header, manifest = dataset.header, dataset.manifest
    size = sum(shard.file.bytes for shard in dataset.shards)
    names = {file.name for file in manifest.files}
    has_tokenizer = f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}" in names
    floor = f", none below probability {header.min_prob:g}" if header.min_prob else ""
    teacher, saw = header.teacher, header.teacher_saw
    kept = header.kept_in_words
    is_import, origin = header.mode == "imported", header.about.imported
    facts = {
        "teacher": teacher.full_name
        + (f" @ {teacher.revision}" if teacher.revision else "")
        + (", as the importer named it; not compared with it" if is_import else ""),
        **({"imported from": origin.in_words if origin else "another tool's files"} if is_import else {}),
        "weights": f"{teacher.dtype}{', ' + teacher.quantization if teacher.quantization else ''}, "
        f"head in {teacher.head_dtype}",
        **({"teacher saw": saw} if saw else {}),
        "kept": f"{kept} of {header.vocab_size:,} ids{floor}; tail mass {header.tail}",
        "draws": header.draws_in_words,
        "targets on": f"loss on {header.loss_on}, mode {header.mode}",
        "rows": f"{manifest.rows:,} in {counted(len(dataset.shards), 'shard')}; {manifest.rejected:,} rejected",
        "tokens": f"{manifest.tokens:,}, at most {header.max_length:,} per row",
        "targets": f"{manifest.targets:,}",
        "size": f"{size:,} bytes" + (f", {size / manifest.targets:.1f} per target" if manifest.targets else ""),
        "tokenizer": f"{header.token_count:,} ids, {'included' if has_tokenizer else 'not included'}; "
        f"fingerprint {header.tokenizer_fingerprint[:16]}",
        "license": header.about.license or "not given",
        "format": f"version {header.format_version}, fidelity {header.codec.fidelity}: "
        f"mean KL of {'the imported values to the stored ones' if is_import else 'the stored values'} below "
        f"{header.codec.mean_kl:g} nats",
        "id": dataset.dataset_id,
        **{f"about.{name[:_MAX_NAME]}": value for name, value in header.about_in_words.items() if name != "imported"},
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(visible(name), Text(shortened(visible(value[: _MAX_VALUE + 1]), _MAX_VALUE)))
    console.print(Text(visible(str(root)), style="bold"))
    console.print(table)


def show_row(root: str | Path, index: int, *, console: Console) -> None:
    """Print row `index` of the dataset at `root`. Raises what `open_row` raises."""
    one = open_row(root, index)
    _print_head(one, console)
    console.print(_running_text(one), soft_wrap=False)
    console.print()
    console.print(_legend())
    console.print()
    for table in _tables(one, width=console.width):
        console.print(table)
    if one.facts.labels.size > MAX_TARGETS:
        console.print(f"The first {MAX_TARGETS:,} of {one.facts.labels.size:,} targets. --html PAGE shows more.")


def percent(probability: float) -> str:
    """At most four characters: 100%, 41%, 4.1%, 0.3%, <.1%."""
    if probability >= 0.0995:
        return f"{100 * probability:.0f}%"
    return f"{100 * probability:.1f}%" if probability >= 0.0005 else "<.1%"


def style_of(probability: float) -> str:
    """The color of a token with this probability."""
    return next(style for least, _, style in LEVELS if probability >= least)


def _print_head(one: InspectedRow, console: Console) -> None:
    row, facts = one.row, one.facts
    title = Text(f"Row {one.index:,} of {len(one.dataset):,}", style="bold")
    console.print(title.append("  " + one.shown_id, style="default not bold"))
    media = f", {len(row.media):,} image{'s' if len(row.media) > 1 else ''}" if row.media else ""
    line = f"{row.token_ids.size:,} tokens, {facts.labels.size:,} targets{media}"
    if facts.labels.size:
        line += (
            f" · surprise {facts.surprise.mean():.2f} nats · entropy ≥ {facts.entropy.mean():.2f} nats"
            f" · tail {percent(facts.tail_mass.mean())} · top-1 correct {percent((facts.label_rank == 1).mean())}"
        )
    console.print(Text(line, style="dim"))
    if row.metadata:
        console.print(Text(one.metadata_start(), style="dim", overflow="fold"))
    console.print()


def _running_text(one: InspectedRow) -> Text:
    probs = np.full(one.row.token_ids.size, np.nan)
    probs[one.facts.positions + 1] = one.facts.label_probs
    text = Text(overflow="fold")
    pieces = one.text.pieces(one.row.token_ids[:MAX_TOKENS].tolist())
    images = dict(shown_media(one.dataset, one.row))
    for place, (piece, prob) in enumerate(zip(pieces, probs.tolist(), strict=False)):
        if place in images:
            text.append(images[place], style="bold")
        else:
            text.append(piece, style="dim" if np.isnan(prob) else style_of(prob))
    if one.row.token_ids.size > MAX_TOKENS:
        text.append(f"\nThe first {MAX_TOKENS:,} of {one.row.token_ids.size:,} tokens.", style="bold")
    return text


def _legend() -> Text:
    legend = Text.assemble(("probability of the actual token ", "dim"))
    for _, name, style in LEVELS:
        legend.append(f" {name} ", style=style)
    return legend.append("  dim: not a target", style="dim")


def _tables(one: InspectedRow, *, width: int) -> Iterator[Table]:
    """The targets of the row in several tables with columns of fixed width.

    One table of 4,096 rows would be slow: it measures all of them before it prints the first.
    """
    token_width = 12 if width < 100 else 20
    numbers = max(5, len(str(one.row.token_ids.size)))
    left = width - (numbers + token_width + 3 * 5 + 6)
    per_line = _ENTRY_WIDE if left >= 78 else _ENTRY_NARROW
    entry_width = min(max(left // per_line, 8), 22)
    shown = min(one.facts.labels.size, MAX_TARGETS)
    for start in range(0, shown, _ROWS_PER_TABLE):
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=start == 0, header_style="dim")
        table.add_column("token", justify="right", style="dim", width=numbers)
        table.add_column("", width=token_width, no_wrap=True)
        table.add_column("nats", justify="right", width=5)
        table.add_column("entr.", justify="right", width=5)
        table.add_column("tail", justify="right", width=5)
        table.add_column("teacher's top five, ✓ actual token", width=entry_width * per_line, no_wrap=True)
        for n in range(start, min(start + _ROWS_PER_TABLE, shown)):
            table.add_row(*_cells(one, n, token_width=token_width, per_line=per_line, entry_width=entry_width))
        yield table


def _cells(one: InspectedRow, n: int, *, token_width: int, per_line: int, entry_width: int) -> list[Text]:
    facts, label = one.facts, int(one.facts.labels[n])
    prob = float(facts.label_probs[n])
    token = Text().append(_cut(one.text.label(label), token_width), style=style_of(prob))
    top = [(int(facts.ids[n, k]), float(facts.probs[n, k])) for k in range(min(TOP, int(facts.counts[n])))]
    if label not in [token_id for token_id, _ in top]:
        top.append((label, prob))
    entries, gap = Text(), " " if per_line == _ENTRY_WIDE else ""
    for place, (token_id, share) in enumerate(top):
        if place and place % per_line == 0:
            entries.append("\n")
        mark, style = ("✓", "bold") if token_id == label else (" ", "")
        shown = _cut(one.text.label(token_id), entry_width - 6 - len(gap))
        entries.append(f"{percent(share):>4}", style=style or "dim")
        entries.append(set_cell_size(f"{gap}{mark}{shown}", entry_width - 4), style=style)
    return [
        Text(str(facts.positions[n] + 1)),
        token,
        Text(f"{facts.surprise[n]:.2f}"),
        Text(f"{facts.entropy[n]:.2f}"),
        Text(percent(float(facts.tail_mass[n]))),
        entries,
    ]


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)).rstrip() + "…"
