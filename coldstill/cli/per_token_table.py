"""Token-by-token records of an evaluation as tables on the terminal, one per dataset row.

The text in `TokenRecord`s is escaped already, and none of it is parsed as markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coldstill.tools.inspect.terminal import percent, style_of
from coldstill.trainer.evaluation.per_token import TOP, Choice, TokenRecord

_CHOICE_WIDTH = 12
_ROWS_AT_ONCE = 256


def show_records(records: Iterable[TokenRecord], *, console: Console) -> None:
    """Print one table per dataset row; a long row is printed in blocks of `_ROWS_AT_ONCE` tokens."""
    for sample_id, group in groupby(records, key=lambda record: record.sample_id):
        of_row = list(group)
        console.print(_title(sample_id, of_row))
        for start in range(0, len(of_row), _ROWS_AT_ONCE):
            console.print(_table(of_row[start : start + _ROWS_AT_ONCE], header=start == 0, width=console.width))


def _title(sample_id: str, records: Sequence[TokenRecord]) -> Text:
    dense = [record.forward_kl for record in records if record.forward_kl is not None]
    bound = sum(record.forward_kl_lower_bound for record in records) / len(records)
    line = f"  {len(records):,} targets · KL to the teacher ≥ {bound:.3f} nats"
    if dense:
        line += f", dense {sum(dense) / len(dense):.3f}"
    return Text(sample_id, style="bold").append(line, style="dim not bold")


def _table(records: Sequence[TokenRecord], *, header: bool, width: int) -> Table:
    numbers = max(5, len(str(records[-1].position + 1)))
    token_width = 10 if width < 100 else 20
    left = width - (numbers + token_width + 3 * 5 + 5)
    choices = min(max(left // _CHOICE_WIDTH, 1), TOP)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=header, header_style="dim")
    table.add_column("token", justify="right", style="dim", width=numbers)
    table.add_column("", width=token_width, no_wrap=True)
    table.add_column("stud.", justify="right", width=5)
    table.add_column("teach", justify="right", width=5)
    table.add_column("KL ≥", justify="right", width=5)
    table.add_column("top of student over teacher, ✓ label", width=choices * _CHOICE_WIDTH, no_wrap=True)
    for record in records:
        tops = [_entries(top[:choices], record.label) for top in (record.student_top, record.teacher_top)]
        table.add_row(
            Text(str(record.position + 1)),
            Text(_cut(record.text, token_width), style=style_of(record.student_prob)),
            Text(percent(record.student_prob)),
            Text(percent(record.teacher_prob)),
            Text(f"{record.forward_kl_lower_bound:.2f}"),
            Text("\n").join(tops),
        )
    return table


def _entries(choices: Sequence[Choice], label: int) -> Text:
    line = Text()
    for choice in choices:
        mark, style = ("✓", "bold") if choice.id == label else (" ", "")
        line.append(f"{percent(choice.prob):>4}", style=style or "dim")
        line.append(set_cell_size(f"{mark}{_cut(choice.text, _CHOICE_WIDTH - 6)}", _CHOICE_WIDTH - 4), style=style)
    return line


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"
