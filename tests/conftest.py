"""Fixtures that more than one folder of tests uses. What they give may be damaged by a test: each gets its own copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import making

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny tokenizer."""
    return making.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def _sealed(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    rng = np.random.default_rng(7)
    root = tmp_path_factory.mktemp("sealed") / "dataset"
    shards = [[making.random_row(rng, f"row-{shard}-{i}") for i in range(8)] for shard in range(3)]
    making.write_dataset(root, shards, header=making.tiny_header(tokenizer_folder), tokenizer=tokenizer_folder)
    return root


@pytest.fixture
def tiny_dataset(_sealed: Path, tmp_path: Path) -> Path:
    """Root of a sealed dataset: V = 64, K = 8, D = 4, 3 shards of 8 rows."""
    return Path(shutil.copytree(_sealed, tmp_path / "tiny dataset"))


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 2-layer Llama of width 32 with the tiny tokenizer."""
    return making.tiny_llama(tmp_path_factory.mktemp("student"))
