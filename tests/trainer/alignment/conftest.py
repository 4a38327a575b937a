"""Tokenizers of this folder's tests, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import tokenizers_made as made


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by kind: three of byte-level BPE, and two of sentencepiece's kinds with byte fallback."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "bytes": made.byte_level(root / "bytes"),
        "more bytes": made.byte_level(root / "more bytes", vocabulary=400, begin=True),
        "fewer bytes": made.byte_level(root / "fewer bytes", vocabulary=272),
        "pieces": made.sentencepiece_bpe(root / "pieces"),
        "unigram": made.unigram(root / "unigram"),
    }


@pytest.fixture(scope="session")
def datasets(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sealed datasets of the tokenizer `bytes`: rows of text, and chats. No test changes them."""
    root, teacher = tmp_path_factory.mktemp("datasets"), tokenizers["bytes"]
    return {
        "text": made.write(root / "text", made.text_rows(teacher), teacher),
        "chat": made.write(root / "chat", made.chat_rows(teacher), teacher, chat=True),
    }


@pytest.fixture(scope="session")
def students(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama for each tokenizer."""
    root = tmp_path_factory.mktemp("students")
    return {name: made.student(root / name, folder) for name, folder in tokenizers.items()}
