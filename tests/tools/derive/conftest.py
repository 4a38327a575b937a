"""The dataset that most tests of this folder derive from."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.header import DatasetHeader
from tests import making
from tests.tools.derive.parts import rich_dataset


@pytest.fixture(scope="session")
def header(tokenizer_folder: Path) -> DatasetHeader:
    """Eight rows a unit."""
    return making.tiny_header(tokenizer_folder)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, header: DatasetHeader, tokenizer_folder: Path) -> Dataset:
    """61 rows in 8 shards, of which the last is not full. Tests only read it."""
    root = tmp_path_factory.mktemp("source") / "a dataset"
    return rich_dataset(root, header, tokenizer_folder, shards=(8, 8, 8, 8, 8, 8, 8, 5))
