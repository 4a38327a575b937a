"""`DatasetHeader`: which teacher a dataset was captured from, and how its targets are taken and stored.

The header is the file `dataset.json`, and is repeated in the footer of every shard. It is created before any unit of
work is dispatched and never changes. It holds no time, host or path, so that equal captures have equal headers.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Literal

from pydantic import BaseModel, Field, JsonValue, model_validator

from coldstill.common.models import FrozenModel, parse_document

from .errors import HeaderMismatch, InvalidHeader, UnsupportedFormat

FORMAT_VERSION = 1
"""Every later release reads version 1. No release reads version 0, the draft before it."""

MAX_TOP_K = 4096
MAX_VOCAB_SIZE = 1 << 20
MAX_TOKENS = 1 << 20
MAX_DRAWS = 1024
MAX_ID_RANKS = 1 << 16
MAX_HEADER_BYTES = 1 << 20
HEADER_NAME = "dataset.json"

_MEAN_KL = {"fine": 1e-5, "coarse": 1e-4, "exact": 1e-6}
_GRID_SCALE = {"fine": 130, "coarse": 41}
"""Rounding to a grid with step s costs a KL of sum p s^2 / 24 over the K + 1 buckets, and s <= 2 / (a sqrt(p)): with
a = scale sqrt(K + 1) that is at most 1 / (6 scale^2), 9.9e-6 and 9.9e-5 nats, for any teacher and K; three times
that where all errors of a position are half a step."""
_GRID_B = 2
"""No stored log-prob is then off by more than a quarter of a nat. 8 would cost 7 % more bytes for a sharp teacher at K
= 64 (`python -m benchmarks.codec --grid-study`)."""


class Codec(FrozenModel):
    """How the kept entries and tails of a row are stored; FORMAT.md specifies both codecs."""

    name: Literal["grid", "float16"] = Field(
        description="`grid`: sorted ids, and log-probs as levels of a companded grid; `float16`: ids by probability, "
        "and log-probs as float16."
    )
    a: int | None = Field(default=None, ge=0, le=1 << 15, description="Grid: resolution at high probability.")
    b: int | None = Field(default=None, ge=1, le=1 << 8, description="Grid: no step is longer than 1 / b nats.")
    fidelity: Literal["fine", "coarse", "exact"] = Field(description="Preset that the parameters come from.")
    mean_kl: float = Field(
        gt=0, description="Guarantee: mean KL(teacher || stored) over kept ids and tail is below this, nats."
    )

    @classmethod
    def preset(cls, fidelity: Literal["fine", "coarse", "exact"], *, top_k: int) -> Codec:
        """The codec of a fidelity preset."""
        mean_kl = _MEAN_KL[fidelity]
        if fidelity == "exact":
            return cls(name="float16", fidelity=fidelity, mean_kl=mean_kl)
        a = math.ceil(_GRID_SCALE[fidelity] * math.sqrt(top_k + 1))
        return cls(name="grid", a=a, b=_GRID_B, fidelity=fidelity, mean_kl=mean_kl)

    @model_validator(mode="after")
    def _grid_has_parameters(self) -> Codec:
        if (self.name == "grid") != (self.a is not None) or (self.name == "grid") != (self.b is not None):
            raise ValueError("codec grid needs both parameters a and b, codec float16 takes none")
        return self


class TeacherFacts(FrozenModel):
    """The teacher model and the numeric types of its engine."""

    name: str = Field(description="Hub name, or the last folder of a local path.")
    revision: str | None = Field(default=None, description="Commit of the Hub repository, for a model of the Hub.")
    weights_fingerprint: str = Field(description="Digest of names, sizes and samples of the weight files.")
    dtype: str = Field(description="Data type of the weights in the engine.")
    head_dtype: str = Field(description="Data type of the logits that the log-probs were computed from.")
    quantization: str | None = Field(default=None, description="Quantization of the weights, if any.")


class DatasetHeader(FrozenModel):
    """The facts that every reader needs before it opens a shard."""

    format_version: int = FORMAT_VERSION
    teacher: TeacherFacts
    tokenizer_fingerprint: str = Field(
        pattern="^[0-9a-f]{64}$",
        description="Digest of the meaning of all ids.",
    )
    chat_template_sha256: str | None = Field(
        default=None, description="Digest of the chat template and its arguments, for chat rows."
    )
    vocab_size: int = Field(ge=1, le=MAX_VOCAB_SIZE, description="Logit columns of the teacher.")
    token_count: int = Field(
        ge=1, le=MAX_VOCAB_SIZE, description="Ids that the tokenizer can produce: every stored id is smaller."
    )
    top_k: int = Field(ge=1, le=MAX_TOP_K, description="K: maximum number of token ids kept per position.")
    min_prob: float = Field(
        ge=0, lt=1, description="Ids with a lower probability are not kept, except the most probable one."
    )
    draws: int = Field(
        ge=0, le=MAX_DRAWS, description="D: number of independent draws from the full softmax at each position."
    )
    kept_draws: int = Field(
        ge=0, le=MAX_DRAWS, description="Maximum number of tail draws kept per position: the first ones in draw order."
    )
    draw_logprobs: bool = Field(default=False, description="Whether the log-prob of each kept draw is stored.")
    draw_seed: int = Field(ge=0, lt=1 << 63, description="Seed of the draws.")
    codec: Codec
    id_ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        max_length=MAX_ID_RANKS,
        description="Rank table: token ids by descending frequency; ids that are not listed follow in ascending order.",
    )
    tail: Literal["exact", "derived"] = Field(
        description="`exact`: log tail from the teacher's own masked sum; `derived`: log(max(1 - sum of kept, 1e-6))."
    )
    mode: Literal["score", "generate", "pretrain", "imported"] = Field(
        default="score",
        description="`score`: the source's own tokens, teacher-forced; `generate`: the teacher's own answers; "
        "`pretrain`: raw documents; `imported`: converted from another tool's dataset.",
    )
    documents: Literal["isolate", "concat"] | None = Field(
        default=None, description="In mode `pretrain`: one document per row, or documents joined to rows of one length."
    )
    sampling: dict[str, JsonValue] | None = Field(
        default=None, description="In mode `generate`: the sampling parameters of the answers."
    )
    loss_on: Literal["all", "assistant", "last_turn", "given"] = Field(
        description="Which tokens of a row are targets; `given`: as the imported dataset marked them."
    )
    order: Literal["exact", "fast"] = Field(
        default="exact",
        description="`exact`: units do not overlap, and equal runs give equal bytes; `fast`: equal rows, with values "
        "within the engine's tolerance.",
    )
    max_length: int = Field(ge=2, le=MAX_TOKENS, description="Maximum length of a row, in tokens.")
    over_long: Literal["reject", "cut", "split"] = Field(description="What was done with longer rows.")
    rows_per_unit: int = Field(ge=1, description="Source rows of one work unit, which is one shard.")
    source_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Digest of the source's content.")
    licence: str | None = Field(default=None, description="License of the dataset.")

    @model_validator(mode="after")
    def _fits(self) -> DatasetHeader:
        if self.token_count > self.vocab_size:
            raise ValueError(f"token_count {self.token_count} is above vocab_size {self.vocab_size}")
        if self.top_k > self.token_count:
            raise ValueError(f"top_k {self.top_k} is above token_count {self.token_count}")
        if self.kept_draws > self.draws:
            raise ValueError(f"kept_draws {self.kept_draws} is above draws {self.draws}")
        if self.id_ranks and (max(self.id_ranks) >= self.token_count or len(set(self.id_ranks)) < len(self.id_ranks)):
            raise ValueError(f"id_ranks has a duplicate id, or an id that is not below token_count {self.token_count}")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON, one field per line: equal headers give equal bytes."""
        fields = self.model_dump(mode="json").items()
        lines = (f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields)
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

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
                fix="read it with the coldstill release that wrote it, or capture it again",
            )
        return parse_document(data, model=cls, where=where, error=InvalidHeader)

    def require_equal(self, other: DatasetHeader, *, where: str, fix: str) -> None:
        """Raises `HeaderMismatch` with the name of the first field in which `other`, found at `where`, differs."""
        mine, theirs = self.model_dump(), other.model_dump()
        for name, value in mine.items():
            if theirs[name] != value:
                raise HeaderMismatch(f"{where}: {name}", found=theirs[name], wanted=value, fix=fix)


class _VersionOnly(BaseModel):
    """The one field that a header of any version has: the version is compared before other fields are validated."""

    format_version: int
