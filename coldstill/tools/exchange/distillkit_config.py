"""How a DistillKit capture was compressed: its `compression_config.yaml` in, a checked model out.

Both of its compressors: `Quantised` (`logprob_compressor`) and `Legacy` (`legacy_logit_compression`), with the names
and the defaults of its own configuration (arcee-ai/DistillKit at a61c2e7, distillkit/compression/config.py). A field
that is not known here is refused: it could change what the bytes mean.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from coldstill.common.models import FrozenModel
from coldstill.storage_schema.header import MAX_TOP_K, MAX_VOCAB_SIZE

from .errors import CompressionUnknown

MAX_CONFIG_BYTES = 1 << 20
FloatName = Literal["float16", "bfloat16", "float32", "float64"]
FLOAT_BYTES: dict[FloatName, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class ResidualBin(FrozenModel):
    """A run of residuals that share a scale."""

    scale_dtype: FloatName
    element_bits: int = Field(ge=1, le=64)
    num_elements: int = Field(ge=1, le=MAX_TOP_K)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed residuals, without the scale."""
        return -(-self.element_bits * self.num_elements // 8)


class Quantised(FrozenModel):
    """Distribution quantisation: some exact values, a curve through the rest, residuals in bins."""

    d: int = Field(ge=2, le=MAX_VOCAB_SIZE)
    k: int = Field(ge=1, le=MAX_TOP_K)
    exact_k: int = Field(ge=0)
    exact_dtype: FloatName = "float32"
    polynomial_terms: tuple[int | Literal["sqrt", "exp"], ...] | None = Field(default=None, max_length=64)
    term_dtype: FloatName = "float32"
    residual_bins: tuple[ResidualBin, ...] = Field(default=(), max_length=MAX_TOP_K)
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Quantised:
        rest = self.k - self.exact_k
        if rest < 0:
            raise ValueError(f"exact_k {self.exact_k} is above k {self.k}")
        if sum(one.num_elements for one in self.residual_bins) > rest:
            raise ValueError(f"residual_bins hold more than k - exact_k = {rest} elements")
        if rest and not self.polynomial_terms and not self.residual_bins:
            raise ValueError("neither polynomial_terms nor residual_bins for the values that are not exact")
        return self

    @property
    def id_bits(self) -> int:
        """Bits of a packed id: ceil(log2 d)."""
        return (self.d - 1).bit_length()

    @property
    def id_bytes(self) -> int:
        """Bytes of a position's packed ids."""
        return -(-self.k * self.id_bits // 8)

    @property
    def value_bytes(self) -> int:
        """Bytes of a position's values."""
        fixed = self.exact_k * FLOAT_BYTES[self.exact_dtype]
        terms = len(self.polynomial_terms or ()) * FLOAT_BYTES[self.term_dtype]
        return fixed + terms + sum(FLOAT_BYTES[one.scale_dtype] + one.packed_bytes for one in self.residual_bins)


class Legacy(FrozenModel):
    """The older compressor: some exact values, a polynomial in the rank or its inverse through the rest."""

    vocab_size: int = Field(ge=2, le=MAX_VOCAB_SIZE)
    k: int = Field(ge=1, le=MAX_TOP_K)
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0, le=64)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: FloatName = "float32"

    @model_validator(mode="after")
    def _fits(self) -> Legacy:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k {self.exact_k} is above k {self.k}")
        return self

    @property
    def d(self) -> int:
        """The vocabulary, by the name that the newer compressor gives it."""
        return self.vocab_size

    @property
    def id_bits(self) -> int:
        """Bits of a packed id: ceil(log2 vocab_size)."""
        return (self.vocab_size - 1).bit_length()

    @property
    def words(self) -> int:
        """64-bit words of a position's packed ids; an id never crosses the end of a word."""
        return -(-self.k // (64 // self.id_bits))

    @property
    def coefficients(self) -> int:
        """Coefficients of a position; none where all values are exact."""
        return 0 if self.exact_k == self.k else self.polynomial_degree + 1 + self.with_sqrt_term


Compression = Quantised | Legacy


def parse_config(data: bytes, *, where: str) -> Compression:
    """The settings in a YAML file: those of a capture, or a training configuration that holds them under `teacher`.

    Raises `CompressionUnknown`.
    """
    fields = _document(data, where)
    teacher = fields.get("teacher")
    if isinstance(teacher, dict):
        fields = teacher
    for name in ("logprob_compressor", "legacy_logit_compression"):
        if isinstance(fields.get(name), dict):
            fields = fields[name]
            break
    model: type[Compression] = Legacy if "polynomial_degree" in fields else Quantised
    try:
        return model.model_validate(fields)
    except ValidationError as failure:
        first = failure.errors()[0]
        field = ".".join(map(str, first["loc"])) or "settings"
        raise CompressionUnknown(f"{where}: {field}", found=repr(first["input"])[:200], wanted=first["msg"]) from None


def _document(data: bytes, where: str) -> dict[str, Any]:
    wanted = "a mapping of settings in YAML"
    try:
        if len(data) > MAX_CONFIG_BYTES:
            raise ValueError(f"{len(data)} bytes")
        # A few aliases of aliases make a document that no memory holds once it is printed.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(data, Loader=yaml.SafeLoader)):
            raise ValueError("an alias")
        document = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CompressionUnknown(where, found=f"{type(error).__name__}: {str(error)[:200]}", wanted=wanted) from None
    if not isinstance(document, dict):
        raise CompressionUnknown(where, found=type(document).__name__, wanted=wanted)
    return document
