"""`coldstill inspect` on the terminal: complete, within the width, and without control characters of the dataset."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import DatasetNotFound
from coldstill.tools.errors import RowOutOfRange
from coldstill.tools.inspect.row_facts import open_row
from coldstill.tools.inspect.terminal import LEVELS, percent, show_dataset, show_row, style_of
from tests import making
from tests.tools.inspect import strange_tokens
from tests.tools.inspect.strange_tokens import hidden_characters


def printed(show: object, *arguments: object, width: int = 80, colors: bool = False) -> str:
    """What a command prints on a terminal of this width."""
    system = "truecolor" if colors else None
    console = Console(file=io.StringIO(), width=width, force_terminal=colors, color_system=system)
    show(*arguments, console=console)  # type: ignore[operator]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_summary_describes_the_dataset(tiny_dataset: Path) -> None:
    text = printed(show_dataset, tiny_dataset)
    dataset = open_dataset(tiny_dataset)
    wanted = ("tiny", "K = 8 of 64", "D = 4", "24 in 3 shards", f"{dataset.manifest.targets:,}", "CC0-1.0", "fine")
    for part in (*wanted, dataset.header.tokenizer_fingerprint[:16], dataset.dataset_id):
        assert part in text.replace("\n", "")
    size = sum(shard.file.bytes for shard in dataset.shards)
    assert f"{size:,} bytes, {size / dataset.manifest.targets:.1f} per target" in text


def test_a_row_is_its_text_and_each_target_with_its_top_five(tiny_dataset: Path) -> None:
    one = open_row(tiny_dataset, 3)
    text = printed(show_row, tiny_dataset, 3, width=140)
    running, table = text.split("probability of the actual token")
    assert one.row.sample_id in running
    assert "".join(one.text.pieces(one.row.token_ids.tolist())) in running
    lines = [line for line in table.splitlines()[1:] if line.strip()][1:]
    assert len(lines) == one.facts.labels.size
    for n, line in enumerate(lines):
        assert line.split()[0] == str(one.facts.positions[n] + 1)
        assert f"{one.facts.surprise[n]:.2f}" in line
        assert f"{one.facts.entropy[n]:.2f}" in line
        assert percent(one.facts.tail_mass[n]) in line
        assert f"✓{one.text.label(int(one.facts.labels[n]))}" in line
        for k in range(5):
            assert percent(one.facts.probs[n, k]) in line
            assert one.text.label(int(one.facts.ids[n, k])) in line


@pytest.mark.parametrize("width", [60, 80, 140])
def test_no_line_is_wider_than_the_terminal(width: int, tmp_path: Path) -> None:
    root = strange_tokens.hostile_dataset(tmp_path / "dataset", tmp_path / "tokenizer")
    for show, arguments in ((show_dataset, (root,)), (show_row, (root, 0))):
        assert max(cell_len(line) for line in printed(show, *arguments, width=width).splitlines()) <= width


def test_no_text_of_the_dataset_reaches_the_terminal_raw(tmp_path: Path) -> None:
    root = strange_tokens.hostile_dataset(tmp_path / "dataset", tmp_path / "tokenizer")
    for show, arguments in ((show_dataset, (root,)), (show_row, (root, 0))):
        assert hidden_characters(printed(show, *arguments)) == set()
        colored = printed(show, *arguments, colors=True)
        assert hidden_characters(colored) <= {"\x1b"}
        assert "\x1b[31m" not in colored
        assert "\x1b]" not in colored
    assert "[bold red]markup[/]" in printed(show_row, root, 0, width=2000)


def test_a_row_without_tokenizer_is_numbers(tokenizer_folder: Path, tmp_path: Path) -> None:
    row = making.random_row(np.random.default_rng(0), "row")
    root = strange_tokens.without_tokenizer(tmp_path / "dataset", [row], tokenizer=tokenizer_folder)
    assert " ".join(f"#{token_id}" for token_id in row.token_ids[:5].tolist()) in printed(show_row, root, 0)
    assert "not included" in printed(show_dataset, root)


@pytest.mark.parametrize("index", [-1, 24, 10**12])
def test_a_row_number_out_of_range_names_the_range(index: int, tiny_dataset: Path) -> None:
    with pytest.raises(RowOutOfRange, match="0 to 23"):
        printed(show_row, tiny_dataset, index)


def test_a_dataset_without_rows_has_no_row_to_show(tokenizer_folder: Path, tmp_path: Path) -> None:
    header = making.tiny_header(tokenizer_folder)
    making.write_dataset(tmp_path / "dataset", [[]], header=header, tokenizer=tokenizer_folder)
    assert "0 in 1 shard;" in printed(show_dataset, tmp_path / "dataset")
    with pytest.raises(RowOutOfRange, match="no rows"):
        printed(show_row, tmp_path / "dataset", 0)


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound):
        printed(show_dataset, tmp_path)


def test_colors_are_steps_of_the_actual_tokens_probability() -> None:
    assert [style_of(prob) for prob in (1.0, 0.1, 0.05, 0.005, 0.0)] == [LEVELS[i][2] for i in (0, 0, 1, 2, 3)]


def test_a_share_takes_at_most_four_characters() -> None:
    shares = np.concatenate([np.linspace(0, 1, 2001), 10.0 ** np.linspace(-9, 0, 500)])
    assert max(len(percent(float(share))) for share in shares) == 4
    assert [percent(share) for share in (1, 0.414, 0.0414, 0.001, 1e-7)] == ["100%", "41%", "4.1%", "0.1%", "<.1%"]
