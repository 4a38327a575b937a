"""Load the teacher's tokenizer, and read the files of it that a dataset carries."""

from __future__ import annotations

import tempfile
from pathlib import Path

import transformers

from coldstill.common.errors import ColdstillError, first_line
from coldstill.storage_schema.tokenizer import TOKENIZER_FILES

from .config import TeacherConfig
from .errors import TeacherUnusable


def load_tokenizer(config: TeacherConfig) -> transformers.PreTrainedTokenizerBase:
    """The teacher's tokenizer. Raises `TeacherUnusable`."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, revision=config.revision)
    except (ValueError, OSError) as error:
        raise cannot_load(config, "tokenizer", error) from None
    if not tokenizer.is_fast:
        raise TeacherUnusable(config.model, found="a slow tokenizer", wanted="one with a tokenizer.json")
    return tokenizer


def tokenizer_files(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that transformers saves for the tokenizer, by name; only those that a dataset carries."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: Path(folder, name).read_bytes() for name in TOKENIZER_FILES if Path(folder, name).exists()}


def cannot_load(teacher: TeacherConfig, what: str, error: Exception) -> ColdstillError:
    """The error for a part of the teacher, such as its `config.json`, that failed to load."""
    return TeacherUnusable(
        f"teacher.model {teacher.model}: {what}",
        found=first_line(error),
        wanted="a folder or Hub name of a causal language model",
        fix="check teacher.model and teacher.revision",
    )
