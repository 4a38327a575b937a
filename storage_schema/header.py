"""`DatasetHeader`: which teacher a dataset was captured from, and how its targets are taken and stored.

The header is the file `dataset.json`, and is repeated in the footer of every shard. It is created before any unit of
work is dispatched and never changes. It holds no time, host or path, so that equal captures have equal headers.

How fields are added: a fact that changes how targets are used is a field of `DatasetHeader`, which a reader must know;
any other fact is a field of `About`, which a reader may ignore. A release writes a field that it added later only where
its value is not the default, so that earlier releases refuse no dataset but those that need the field.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from coldstill.common.models import FrozenModel, parse_document
from coldstill.common.visible import visible

from .errors import HeaderMismatch, InvalidHeader, UnsupportedFormat
from .header_facts import About, TeacherFacts, TeacherPrompt
from .header_format_1 import TEACHER_FIELDS, format_1_fields, from_format_1
from .tokenizer import TokenIds

FORMAT_VERSION = 2
"""The version that is written."""
READ_VERSIONS = (1, 2)
"""Every later release reads these. No release reads version 0, the draft before them."""

MAX_TOP_K = 4096
MAX_VOCAB_SIZE = 1 << 20
MAX_TOKENS = 1 << 20
MAX_DRAWS = 1024
MAX_ID_RANKS = 1 << 16
MAX_HEADER_BYTES = 1 << 20
HEADER_NAME = "dataset.json"

_MAX_LISTED = 32
_SHA256 = "^[0-9a-f]{64}$"
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


class DatasetHeader(FrozenModel):
    """The facts that every reader needs before it opens a shard."""

    format_version: int = FORMAT_VERSION
    teacher: TeacherFacts
    tokenizer_fingerprint: str = Field(
        pattern=_SHA256,
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
    draws: int = Field(ge=0, le=MAX_DRAWS, description="D: maximum number of draws at each position.")
    draw_method: Literal["iid", "systematic"] = Field(
        default="iid",
        description="`iid`: independent draws; `systematic`: equally spaced points of the distribution, shifted at "
        "random.",
    )
    draw_from: Literal["softmax", "tail"] = Field(
        default="softmax",
        description="`softmax`: from all ids, of which those outside the kept ids count; `tail`: from those outside "
        "the kept ids.",
    )
    draw_number: Literal["fixed", "by_tail_mass"] = Field(
        default="fixed",
        description="`fixed`: D draws at each position; `by_tail_mass`: D times the tail's mass, rounded up or down at "
        "random, with that mean.",
    )
    draw_weights: Literal["equal"] = Field(
        default="equal", description="`equal`: the draws of a position share its tail mass equally."
    )
    kept_draws: int = Field(ge=0, le=MAX_DRAWS, description="Maximum number of tail draws kept per position.")
    draw_logprobs: bool = Field(default=False, description="Whether the log-prob of each kept draw is stored.")
    kept_ids: Literal["top_k", "top_k_and_named"] = Field(
        default="top_k",
        description="`top_k`: the most probable ids; `top_k_and_named`: those, and ids that the source named.",
    )
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
    source_sha256: str = Field(pattern=_SHA256, description="Digest of the source's content.")
    teacher_prompt: TeacherPrompt | None = Field(
        default=None, description="How the teacher's prompt was made, where the teacher saw another one than the row's."
    )
    about: About = Field(default_factory=About, description="Facts that a reader may ignore.")

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
        """Canonical JSON, one field per line: equal headers give equal bytes. A header of format 1 keeps its form."""
        fields = self.model_dump(mode="json")
        fields["about"] = self.about.stated
        if self.format_version == 1:
            fields = format_1_fields(fields)
        lines = (f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @property
    def sha256(self) -> str:
        """Digest of the canonical JSON."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> DatasetHeader:
        """The header in `data`, of any format version that is read.

        Raises `InvalidHeader`, or `UnsupportedFormat` for another version, an unknown field, or an unknown value of a
        field that is known.
        """
        if len(data) > MAX_HEADER_BYTES:
            raise InvalidHeader(f"{where}: size", found=f"{len(data)} bytes", wanted=f"at most {MAX_HEADER_BYTES}")
        document = parse_document(data, model=_AnyHeader, where=where, error=InvalidHeader)
        if document.format_version not in READ_VERSIONS:
            raise UnsupportedFormat(
                f"{where}: format_version",
                found=document.format_version,
                wanted=" or ".join(map(str, READ_VERSIONS)),
                fix="read it with the coldstill release that wrote it, or capture it again",
            )
        if document.format_version == 1:
            data = from_format_1(data, where=where)
        else:
            _require_known(document.model_extra or {}, where)
        return parse_document(data, model=cls, where=where, error=InvalidHeader)

    def require_equal(self, other: DatasetHeader, *, where: str, fix: str) -> None:
        """Raises `HeaderMismatch` with the name of the first field in which `other`, found at `where`, differs.

        Of `about`, the license is compared, a renormalization, and the facts that both state, except what an import
        says of its files, which `source_sha256` covers. A header of format 1 states less about the teacher: what it
        cannot state is not compared.
        """
        mine, theirs = self._comparable(other), other._comparable(self)
        for name, value in mine.items():
            if theirs[name] != value:
                name, value, other_value = _first_difference(name, value, theirs[name])
                raise HeaderMismatch(f"{where}: {name}", found=other_value, wanted=value, fix=fix)

    @property
    def ids(self) -> TokenIds:
        """The ids of the tokenizer."""
        return TokenIds(self.token_count, self.tokenizer_fingerprint)

    @property
    def teacher_saw(self) -> str | None:
        """What the teacher saw, for people, where its prompt was not the row's."""
        prompt = self.teacher_prompt
        return f"more than the student: another prompt than the row's, made by {prompt.kind}" if prompt else None

    @property
    def has_plain_draws(self) -> bool:
        """Whether each position has D independent draws from the full softmax."""
        return (self.draw_method, self.draw_from, self.draw_number) == ("iid", "softmax", "fixed")

    @property
    def has_draws_by_tail_mass(self) -> bool:
        """Whether each position has D times its tail's mass draws from the tail, rounded at random."""
        return (self.draw_from, self.draw_number) == ("tail", "by_tail_mass")

    @property
    def kept_in_words(self) -> str:
        """Which ids a position keeps, for people."""
        if self.kept_ids == "top_k":
            return f"K = {self.top_k:,}"
        named = self.about.score_ids
        of_top = f"the {named.top_k:,} most probable ones" if named else "the most probable ones"
        return f"at most {self.top_k:,}: {of_top}, and those that the source named,"

    @property
    def width_in_words(self) -> str:
        """How many ids a position keeps, for people, in a few words."""
        if self.kept_ids == "top_k":
            return f"K = {self.top_k:,}"
        named = self.about.score_ids
        if named is None:
            return f"at most {self.top_k:,} ids, named ones among them"
        return f"K = {named.top_k:,} and at most {named.most:,} named ids"

    @property
    def draws_in_words(self) -> str:
        """How the draws were made, for people."""
        if not self.draws:
            return "none"
        number, most = f"D = {self.draws:,}", f"at most {self.kept_draws:,}"
        made = {"iid": "independent", "systematic": "systematic"}[self.draw_method]
        if self.draw_number == "by_tail_mass":
            return f"{made} draws from the tail, {number} times its mass, {most}"
        if self.draw_from == "tail":
            return f"{number} {made} draws from the tail, {most} of them stored"
        return f"{number} {made} draws from the full softmax; those outside the kept ids are stored, {most}"

    @property
    def about_in_words(self) -> dict[str, str]:
        """The facts in `about` but the license, known and unknown, as JSON; at most `_MAX_LISTED` of them."""
        facts = [(name, value) for name, value in self.about.stated.items() if name != "license"]
        return {name: json.dumps(value, ensure_ascii=False) for name, value in facts[:_MAX_LISTED]}

    def newest(self) -> DatasetHeader:
        """The same facts in the format that is written."""
        return self.model_copy(update={"format_version": FORMAT_VERSION})

    def stands_for(self, copy: DatasetHeader) -> bool:
        """Whether `copy`, in the footer of a shard, is a copy of this header: equal, or its form in format 1."""
        if copy.format_version == self.format_version:
            return copy == self
        return copy.format_version == 1 and copy._comparable(self) == self._comparable(copy)

    def _comparable(self, other: DatasetHeader) -> dict[str, JsonValue]:
        fields: dict[str, Any] = self.model_dump(mode="json", exclude={"about"})
        theirs = other.about.stated
        mine = {name: value for name, value in self.about.stated.items() if name in theirs and name != "imported"}
        fields |= {f"about.{name}": value for name, value in mine.items()}
        fields["about.license"] = self.about.license
        fields["about.normalized_over"] = "kept" if self.about.normalized_over == "kept" else None
        if 1 in (self.format_version, other.format_version):
            del fields["format_version"]
            fields["teacher"] = {name: fields["teacher"][name] for name in TEACHER_FIELDS}
        return fields


def _first_difference(name: str, mine: JsonValue, theirs: JsonValue) -> tuple[str, JsonValue, JsonValue]:
    """The innermost field, and its two values, at which two different values of the field `name` differ."""
    while isinstance(mine, dict) and isinstance(theirs, dict):
        key = next(
            key for key in {**mine, **theirs} if key not in mine or key not in theirs or mine[key] != theirs[key]
        )
        name, mine, theirs = f"{name}.{key}", mine.get(key), theirs.get(key)
    return name, mine, theirs


class _AnyHeader(BaseModel):
    """A header of any version: its version and the names of its fields are compared before its values are validated."""

    model_config = ConfigDict(extra="allow")

    format_version: int


def _require_known(fields: dict[str, object], where: str) -> None:
    """Raise `UnsupportedFormat` for a field, or the value of a choice, that a later release added."""
    fix = "install a newer coldstill: this dataset needs it to be read rightly"
    for name, value in fields.items():
        if name not in DatasetHeader.model_fields:
            raise UnsupportedFormat(
                f"{where}: {visible(name)[:80]}", found="an unknown field", wanted="the fields of FORMAT.md", fix=fix
            )
        choices = get_args(DatasetHeader.model_fields[name].annotation)
        is_choice = get_origin(DatasetHeader.model_fields[name].annotation) is Literal
        if is_choice and isinstance(value, str) and value not in choices:
            raise UnsupportedFormat(f"{where}: {name}", found=repr(value)[:80], wanted=" or ".join(choices), fix=fix)
