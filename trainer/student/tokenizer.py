"""The student's tokenizer: its files, and the check against the dataset's ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from coldstill.common.errors import first_line
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import TokenizerMismatch, TokenizerNotFound
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.tokenizer import (
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    fingerprint_bytes,
    first_difference,
    load_faithfully,
)
from coldstill.trainer.config import StudentConfig

from .load import SpecialTokens, student_not_found

logger = logging.getLogger(__name__)

STUDENT_TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""The tokenizer files that are copied from the student's folder to the finished student."""


def tokenizer_files(student: StudentConfig, dataset: Dataset) -> dict[str, bytes]:
    """Name and content of each tokenizer file: the student's own, or the dataset's for a student from scratch.

    Raises `StudentNotFound`, `TokenizerNotFound`, and what `Dataset.read_file` raises.
    """
    if student.model is None:
        listed = [file for file in dataset.manifest.files if file.name.startswith(f"{TOKENIZER_FOLDER}/")]
        files = {file.name.removeprefix(f"{TOKENIZER_FOLDER}/"): dataset.read_file(file) for file in listed}
    else:
        folder = _folder(student.model)
        files = {name: (folder / name).read_bytes() for name in STUDENT_TOKENIZER_FILES if (folder / name).is_file()}
    if TOKENIZER_FILE not in files:
        raise TokenizerNotFound(
            f"tokenizer of the student {student.name}",
            found=f"no {TOKENIZER_FILE}" + (f", only {', '.join(sorted(files))}" if files else ""),
            wanted=f"a {TOKENIZER_FILE}, as the tokenizers library writes it",
            fix="save the tokenizer with `save_pretrained` of a fast tokenizer of transformers",
        )
    return files


def check_tokenizer(tokenizer_json: bytes, header: DatasetHeader, *, name: str) -> None:
    """Raise `TokenizerMismatch` unless the student's and the teacher's ids have equal meanings.

    Also raises `TokenizerNotFound`, if `tokenizer_json` is not a tokenizer.
    """
    facts = fingerprint_bytes(tokenizer_json, where=f"tokenizer of the student {name}")
    if facts.fingerprint != header.tokenizer_fingerprint:
        raise TokenizerMismatch(
            f"tokenizer of the student {name}",
            found=f"{facts.token_count} ids, fingerprint {facts.fingerprint[:12]}",
            wanted=f"{header.token_count} ids, fingerprint {header.tokenizer_fingerprint[:12]} ({header.teacher.name})",
            fix="choose a student of the teacher's family, or capture with a teacher of the student's family",
        )
    stored = header.about.tokenizer_pipeline_sha256
    if stored is not None and stored != facts.pipeline_sha256:
        logger.warning(
            "The tokenizer of the student %s splits text in another way than the teacher's (%s), though equal ids mean "
            "equal tokens. The dataset's targets can be used; the student will see other ids for the same new text.",
            name,
            header.teacher.name,
        )


def special_tokens(files: Mapping[str, bytes], header: DatasetHeader) -> SpecialTokens:
    """The special tokens of the tokenizer in `files`, and the ids at which the teacher of the dataset stops."""
    ids = Tokenizer.from_str(files[TOKENIZER_FILE].decode())
    stated: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            document = json.loads(files.get(name, b"{}"))
        except (ValueError, RecursionError):
            continue
        stated |= document if isinstance(document, dict) else {}

    def find(kind: str) -> int | None:
        token = stated.get(kind)
        token = token.get("content") if isinstance(token, dict) else token
        found: int | None = ids.token_to_id(token) if isinstance(token, str) else None
        return found

    eos = find("eos_token")
    ends = dict.fromkeys([*(() if eos is None else (eos,)), *(header.about.end_token_ids or ())])
    return SpecialTokens(
        bos=find("bos_token"),
        pad=find("pad_token"),
        ends=tuple(end for end in ends if end < header.token_count),
        token_count=header.token_count,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the student `name`, a folder or Hub name.

    Raises `StudentNotFound`, and `TokenizerUnfaithful` for one that transformers rebuilds wrongly.
    """
    loaders = [lambda kind=kind: kind.from_pretrained(name) for kind in (AutoTokenizer, PreTrainedTokenizerFast)]
    path = _folder(name) / TOKENIZER_FILE
    try:
        tokenizer: PreTrainedTokenizerBase = load_faithfully(
            loaders, path.read_bytes() if path.is_file() else None, where=name
        )
    except (OSError, ValueError, ImportError) as error:
        raise student_not_found(name, error) from error
    return tokenizer


def warn_if_unfaithful(folder: Path) -> None:
    """Log a warning if transformers rebuilds the tokenizer in a finished student's folder as a class that differs from
    its file: the class follows from the model's type too, which may be another one than the teacher's."""
    try:
        found = first_difference(AutoTokenizer.from_pretrained(folder), (folder / TOKENIZER_FILE).read_bytes())
    except Exception as error:  # of any class: the run is over, and must not be lost to its last check
        found = first_line(error)
    if found:
        logger.warning(
            "AutoTokenizer loads the tokenizer in %s wrongly (%s): load it with PreTrainedTokenizerFast", folder, found
        )


def _folder(name: str) -> Path:
    """Local folder with the tokenizer files of the student `name`; those of a hub name are downloaded."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(STUDENT_TOKENIZER_FILES)))
    except (OSError, ValueError) as error:
        raise student_not_found(name, error) from error
