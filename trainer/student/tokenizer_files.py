"""The tokenizer that goes with the student: the student's settings come in, its files as bytes go out."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import TokenizerNotFound
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER
from coldstill.trainer.config import StudentConfig

from .not_found import student_not_found

TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""What a student's folder may hold of its tokenizer; the finished student gets the same files."""


def tokenizer_files(student: StudentConfig, dataset: Dataset) -> dict[str, bytes]:
    """Name and content of each tokenizer file: the student's own, or the dataset's for a student from scratch.

    Raises `StudentNotFound`, `TokenizerNotFound`, and what `Dataset.read_file` raises.
    """
    if student.model is None:
        listed = [file for file in dataset.manifest.files if file.name.startswith(f"{TOKENIZER_FOLDER}/")]
        files = {file.name.removeprefix(f"{TOKENIZER_FOLDER}/"): dataset.read_file(file) for file in listed}
    else:
        folder = _folder(student.model)
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if TOKENIZER_FILE not in files:
        raise TokenizerNotFound(
            f"tokenizer of the student {student.name}",
            found=f"no {TOKENIZER_FILE}" + (f" beside {', '.join(sorted(files))}" if files else ""),
            wanted=f"a {TOKENIZER_FILE}, as the tokenizers library writes it",
            fix="save the tokenizer with transformers' `save_pretrained` of a fast tokenizer",
        )
    return files


def _folder(name: str) -> Path:
    """Local folder with the tokenizer files of the student `name`; they are fetched where it is a hub name."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except (OSError, ValueError) as error:
        raise student_not_found(name, error) from error
