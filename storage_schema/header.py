"""`DatasetHeader`: whose distributions a dataset holds and how they were taken and stored.

The header is `dataset.json`, stands in every shard's footer too, is created before any unit of work is given out and
never changes. It holds no time, host or path, so that equal captures have equal headers.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .documents import parse_document
from .errors import HeaderMismatch, InvalidHeader, UnsupportedFormat

FORMAT_VERSION = 0
"""0: the draft before the format is frozen. Datasets of format 0 are not promised to be read by later releases."""

MAX_TOP_K = 4096
MAX_VOCAB_SIZE = 1 << 20
MAX_HEADER_BYTES = 1 << 20
HEADER_NAME = "dataset.json"


class TeacherFacts(BaseModel):
    """Which model spoke."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Hub name, or the last folder name of a local path.")
    revision: str | None = Field(default=None, description="Commit of the hub repository, where there is one.")
    weights_fingerprint: str = Field(description="Digest over the weight files; see pipeline/teachers/fingerprint.py.")
    dtype: str = Field(description="Data type of the weights in the engine.")
    head_dtype: str = Field(description="Data type of the logits that the log-probs were computed from.")
    quantization: str | None = Field(default=None, description="Quantisation of the weights, if any.")


class DatasetHeader(BaseModel):
    """Whose distributions these are, and what every reader must know before it opens a shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    codec: Literal["float16"] = Field(
        default="float16", description="How the streams of a row are encoded; see FORMAT.md."
    )
    teacher: TeacherFacts
    tokenizer_fingerprint: str = Field(pattern="^[0-9a-f]{64}$", description="See storage_schema/tokenizer.py.")
    chat_template_sha256: str | None = Field(default=None, description="Digest of the chat template, for chat rows.")
    vocab_size: int = Field(ge=1, le=MAX_VOCAB_SIZE, description="Logit columns of the teacher.")
    token_count: int = Field(
        ge=1, le=MAX_VOCAB_SIZE, description="Ids that the tokenizer can produce; all stored ids are below."
    )
    top_k: int = Field(ge=1, le=MAX_TOP_K, description="K: the most ids kept at a position.")
    min_prob: float = Field(
        ge=0, lt=1, description="Floor: ids less probable than this are not kept (the first always is)."
    )
    draws: int = Field(ge=0, le=1024, description="D: iid draws from the full softmax taken at each position.")
    draw_seed: int = Field(ge=0, lt=1 << 63, description="Key of the generator of the draws.")
    tail: Literal["exact", "derived"] = Field(
        description="`exact`: log tail from the teacher's own masked sum; `derived`: log(max(1 - sum of kept, 1e-6))."
    )
    mode: Literal["score"] = Field(default="score", description="`score`: the source's own tokens, teacher-forced.")
    loss_on: Literal["all", "assistant", "last_turn"] = Field(description="Which tokens of a row are targets.")
    order: Literal["exact"] = Field(
        default="exact", description="`exact`: a unit is a barrier, equal runs give equal bytes."
    )
    max_length: int = Field(ge=2, description="The most tokens of a row.")
    over_long: Literal["reject", "cut"] = Field(description="What happened to rows of more tokens.")
    rows_per_unit: int = Field(ge=1, description="Source rows of one unit of work, one shard.")
    source_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Digest of the source's content.")
    licence: str | None = Field(default=None, description="Under which terms the dataset may be used.")

    @model_validator(mode="after")
    def _fits(self) -> DatasetHeader:
        if self.token_count > self.vocab_size:
            raise ValueError(f"token_count {self.token_count} is above vocab_size {self.vocab_size}")
        if self.top_k > self.token_count:
            raise ValueError(f"top_k {self.top_k} is above token_count {self.token_count}")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal headers give equal bytes."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @property
    def sha256(self) -> str:
        """Digest of the canonical JSON."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> DatasetHeader:
        """The header in `data`. Raises `InvalidHeader`, or `UnsupportedFormat` for another format version."""
        if len(data) > MAX_HEADER_BYTES:
            raise InvalidHeader(f"{where}: size", found=f"{len(data)} bytes", wanted=f"at most {MAX_HEADER_BYTES}")
        version = parse_document(data, model=_VersionOnly, where=where, error=InvalidHeader).format_version
        if version != FORMAT_VERSION:
            raise UnsupportedFormat(
                f"{where}: format_version",
                found=version,
                wanted=FORMAT_VERSION,
                fix="read it with the release of coldstill that wrote it, or capture it again",
            )
        return parse_document(data, model=cls, where=where, error=InvalidHeader)

    def require_equal(self, other: DatasetHeader, *, where: str, fix: str) -> None:
        """Raise `HeaderMismatch` that names the first field in which `other`, found at `where`, differs."""
        mine, theirs = self.model_dump(), other.model_dump()
        for name, value in mine.items():
            if theirs[name] != value:
                raise HeaderMismatch(f"{where}: {name}", found=theirs[name], wanted=value, fix=fix)


class _VersionOnly(BaseModel):
    """Of a header of any version only this is known: more must not be demanded before it is compared."""

    format_version: int
