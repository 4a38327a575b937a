"""The teacher's tokenizer: loaded by name, and its files for who receives the dataset."""

from __future__ import annotations

import tempfile
from pathlib import Path

import transformers

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.tokenizer import TOKENIZER_FILES

from .config import TeacherConfig
from .errors import TeacherUnusable


def load_tokenizer(config: TeacherConfig) -> transformers.PreTrainedTokenizerBase:
    """The teacher's tokenizer. Raises `TeacherUnusable`."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, revision=config.revision)
    except (ValueError, OSError) as error:
        raise unusable(config, "tokenizer", error) from None
    if not tokenizer.is_fast:
        raise TeacherUnusable(config.model, found="a slow tokenizer", wanted="one with a tokenizer.json")
    return tokenizer


def files_of(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The tokenizer's files by name, as transformers saves them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: Path(folder, name).read_bytes() for name in TOKENIZER_FILES if Path(folder, name).exists()}


def unusable(teacher: TeacherConfig, what: str, error: Exception) -> ColdstillError:
    """The error for a part of the teacher that cannot be loaded."""
    return TeacherUnusable(
        f"teacher.model {teacher.model}: {what}",
        found=str(error).strip().splitlines()[0],
        wanted="a folder or hub name of a causal language model",
        fix="check teacher.model and teacher.revision",
    )
