"""The student: a folder or hub name comes in, a model that fits the dataset goes out, or a named error."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedModel

from storage_schema import DatasetHeader
from storage_schema.errors import TokenizerMismatch
from storage_schema.tokenizer import fingerprint

from .errors import StudentHeadTooSmall, StudentNotFound

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""What a student's folder may hold of its tokenizer; the finished student gets the same files."""


def tokenizer_folder(name: str) -> Path:
    """Local folder with the tokenizer files of the student `name`; they are fetched where it is a hub name.

    Raises `StudentNotFound`.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error


def check_tokenizer(name: str, header: DatasetHeader) -> None:
    """Raise `TokenizerMismatch` unless the student's ids mean what the teacher's ids mean; `TokenizerNotFound`."""
    facts = fingerprint(tokenizer_folder(name))
    if facts.fingerprint != header.tokenizer_fingerprint:
        raise TokenizerMismatch(
            f"tokenizer of the student {name}",
            found=f"{facts.token_count} ids, fingerprint {facts.fingerprint[:12]}",
            wanted=f"{header.token_count} ids, fingerprint {header.tokenizer_fingerprint[:12]} ({header.teacher.name})",
            fix="take a student of the teacher's family, or capture with a teacher of the student's family",
        )


def load_student(name: str, header: DatasetHeader) -> PreTrainedModel:
    """The model, with float32 weights, checked against the dataset before a step is taken.

    A head with more rows than the tokenizer has ids is fine: the rows beyond are left out of every softmax (teachers
    and students of one family often differ in padding: 152,064 against 151,936 rows).
    Raises `StudentNotFound`, `TokenizerNotFound`, `TokenizerMismatch`, `StudentHeadTooSmall`.
    """
    check_tokenizer(name, header)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error
    check_head(model, header, name=name)
    return model


def check_head(model: PreTrainedModel, header: DatasetHeader, *, name: str) -> None:
    """Raise `StudentHeadTooSmall` where some id of the tokenizer has no row in the student's head."""
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < header.token_count:
        raise StudentHeadTooSmall(
            f"head of the student {name}",
            found=f"{rows} rows",
            wanted=f"at least {header.token_count}, one per id of the dataset's tokenizer",
            fix=f"call model.resize_token_embeddings({header.token_count}) and save the student again",
        )


def _not_found(name: str, error: Exception) -> StudentNotFound:
    return StudentNotFound(
        f"student {name}",
        found=(str(error).strip() or type(error).__name__).splitlines()[0],
        wanted="a folder or hub name of a causal language model that transformers can load",
        fix="check student.model; for a hub name without network, download it first",
    )
