"""Datasets are read as the campaign reads them: in a child process of 1 GiB of address space and 2 s for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.bases import Base, make_bases
from tests.fuzz.children import Child
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import Read, written


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def tree(bases: list[Base]) -> Tree:
    """The files of a dataset with every stream, to be changed."""
    return Tree(bases[0].files)


@pytest.fixture(scope="session")
def child(bases: list[Base]) -> Iterator[Child]:
    with Child(bases[0].root) as child:
        yield child


@pytest.fixture
def read(child: Child, tmp_path: Path) -> Read:
    """Have a child read the files, resealed by the caller or not."""

    def run(tree: Tree) -> dict[str, Any]:
        answer = child.read(written(tree, tmp_path / "dataset"))
        assert not answer.get("died")
        assert not answer.get("unnamed")
        return answer

    return run
