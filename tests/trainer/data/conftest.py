"""Datasets of many row groups, written once; tests that damage one copy it first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import making

from .datasets import make_rows, write_grouped


@pytest.fixture(scope="session")
def grouped(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> str:
    """77 rows in 4 shards of up to 6 row groups, one of them empty; read-only."""
    rows = make_rows(77)
    shards = [rows[:30], [], rows[30:65], rows[65:]]
    root = tmp_path_factory.mktemp("grouped") / "dataset"
    header = making.tiny_header(tokenizer_folder)
    return write_grouped(root, shards, header=header, tokenizer=tokenizer_folder, rows_of_group=5)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> str:
    """40 rows of other names, with the draws' log-probs; read-only."""
    rows = make_rows(40, name="other", seed=1, draw_logprobs=True)
    root = tmp_path_factory.mktemp("other") / "dataset"
    header = making.tiny_header(tokenizer_folder, draw_logprobs=True)
    return write_grouped(root, [rows[:20], rows[20:]], header=header, tokenizer=tokenizer_folder, rows_of_group=4)
