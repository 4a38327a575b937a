"""Fixtures of the tests of import and export."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import making
from tests.tools.exchange import peers


@pytest.fixture(scope="session")
def wide_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of as many ids as the teacher of `peers.py` has."""
    return making.tiny_tokenizer(tmp_path_factory.mktemp("wide tokenizer"), vocabulary=peers.VOCABULARY)


@pytest.fixture(scope="module")
def texts() -> list[peers.Sequence]:
    """Enough text that the alignment shows."""
    return peers.sequences(12, length=60)
