"""Whether a student fits a dataset: its tokenizer and its head come in; silence, or a named error."""

from __future__ import annotations

from transformers import PreTrainedModel

from coldstill.storage_schema.errors import TokenizerMismatch
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.tokenizer import fingerprint_bytes
from coldstill.trainer.errors import StudentHeadTooSmall


def check_tokenizer(tokenizer_json: bytes, header: DatasetHeader, *, name: str) -> None:
    """Raise `TokenizerMismatch` unless the student's ids mean what the teacher's ids mean; `TokenizerNotFound`."""
    facts = fingerprint_bytes(tokenizer_json, where=f"tokenizer of the student {name}")
    if facts.fingerprint != header.tokenizer_fingerprint:
        raise TokenizerMismatch(
            f"tokenizer of the student {name}",
            found=f"{facts.token_count} ids, fingerprint {facts.fingerprint[:12]}",
            wanted=f"{header.token_count} ids, fingerprint {header.tokenizer_fingerprint[:12]} ({header.teacher.name})",
            fix="take a student of the teacher's family, or capture with a teacher of the student's family",
        )


def check_head(model: PreTrainedModel, header: DatasetHeader, *, name: str) -> None:
    """Raise `StudentHeadTooSmall` where some id of the tokenizer has no row in the student's head.

    A head with more rows than the tokenizer has ids is fine: the rows beyond are left out of every softmax (teachers
    and students of one family often differ in padding: 152,064 against 151,936 rows).
    """
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < header.token_count:
        raise StudentHeadTooSmall(
            f"head of the student {name}",
            found=f"{rows} rows",
            wanted=f"at least {header.token_count}, one per id of the dataset's tokenizer",
            fix=f"call model.resize_token_embeddings({header.token_count}) and save the student again",
        )
