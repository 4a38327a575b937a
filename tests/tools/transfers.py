"""Names and datasets of tests that push and pull."""

from __future__ import annotations

from pathlib import Path

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.tools.pull import dataset_files
from tests import making

NAME = "some-org/some-dataset"
URL = f"hf://datasets/{NAME}"


def names(dataset: Dataset) -> set[str]:
    return {file.name for file in dataset_files(dataset)} | {MANIFEST_NAME}


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def another_dataset(root: Path, tokenizer: Path) -> Path:
    import numpy as np

    rows = [making.random_row(np.random.default_rng(99), "other")]
    making.write_dataset(root, [rows], header=making.tiny_header(tokenizer), tokenizer=tokenizer)
    return root
