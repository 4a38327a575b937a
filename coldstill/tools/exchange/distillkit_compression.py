"""DistillKit's compression: the settings of a capture, and packed bytes to ids and log-probs.

Shape letters: `N` positions, `k` kept ids, `e` exact values, `n` elements of a bin, `B` bytes of a position.

Both of its compressors, `Quantized` (`logprob_compressor`) and `Legacy` (`legacy_logit_compression`), with the field
names, defaults and formulas of arcee-ai/DistillKit at a61c2e7 (distillkit/compression). An unknown field is rejected:
it could change what the bytes mean.

A position's values, most probable first, are `e` exact floats. The other `k - e` are the curve `sum_i c_i f_i(t)` at
`t = 0, 1, ...` (`f` a power, `sqrt` or `exp`; `t / (k - e - 1)` if normalized) plus residuals `scale * q`, bin by bin.
With delta encoding each value is a step from the one before. Packed numbers are a bit stream, highest bit first, padded
to a whole byte at the end of each run. A curve with 16-bit coefficients is rounded to their type, as the encoder did
before it took residuals.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from coldstill.common.models import FrozenModel
from coldstill.storage_schema.header import MAX_TOP_K, MAX_VOCAB_SIZE
from coldstill.tools.errors import CompressionUnknown, invalid_field

from .derived_targets import MIN_TAIL

MAX_CONFIG_BYTES = 1 << 20
FloatName = Literal["float16", "bfloat16", "float32", "float64"]
FLOAT_BYTES: dict[FloatName, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SIGNIFICANT_BITS: dict[FloatName, int] = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}


class ResidualBin(FrozenModel):
    """Consecutive residuals that share a scale."""

    scale_dtype: FloatName
    element_bits: int = Field(ge=1, le=64)
    num_elements: int = Field(ge=1, le=MAX_TOP_K)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed residuals, without the scale."""
        return -(-self.element_bits * self.num_elements // 8)


class Quantized(FrozenModel):
    """Distribution quantization: some exact values, a curve through the others, and residuals in bins."""

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
    def _fits(self) -> Quantized:
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
    """The older compressor: some exact values, and a polynomial in the rank or its inverse through the others."""

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
        """The vocabulary size, under its name in the newer compressor."""
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
        """Coefficients of a position; 0 if all values are exact."""
        return 0 if self.exact_k == self.k else self.polynomial_degree + 1 + self.with_sqrt_term


Compression = Quantized | Legacy


def parse_config(data: bytes, *, where: str) -> Compression:
    """The settings in a YAML file: a capture's own, or a training configuration that holds them under `teacher`.

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
    model: type[Compression] = Legacy if "polynomial_degree" in fields else Quantized
    try:
        return model.model_validate(fields)
    except ValidationError as failure:
        raise invalid_field(failure, where=where, error=CompressionUnknown) from None


def _document(data: bytes, where: str) -> dict[str, Any]:
    wanted = "a mapping of settings in YAML"
    try:
        if len(data) > MAX_CONFIG_BYTES:
            raise ValueError(f"{len(data)} bytes")
        # Nested aliases can expand a small document beyond all memory once it is printed.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(data, Loader=yaml.SafeLoader)):
            raise ValueError("an alias")
        document = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CompressionUnknown(where, found=f"{type(error).__name__}: {str(error)[:200]}", wanted=wanted) from None
    if not isinstance(document, dict):
        raise CompressionUnknown(where, found=type(document).__name__, wanted=wanted)
    return document


def unpack_stream(packed: np.ndarray, *, bits: int, count: int) -> np.ndarray:
    """`uint64 [N, count]` numbers of `bits` bits from a bit stream `uint8 [N, B]`, highest bit first."""
    stream = np.unpackbits(packed, axis=1, count=bits * count).reshape(len(packed), count, bits)
    width = next(size for size in (8, 16, 32, 64) if size >= bits)
    whole = np.zeros((len(packed), count, width), np.uint8)
    whole[:, :, width - bits :] = stream
    numbers = np.packbits(whole.reshape(len(packed), count * width), axis=1)
    return numbers.view(f">u{width // 8}").astype(np.uint64)


def unpack_words(words: np.ndarray, *, bits: int, count: int) -> np.ndarray:
    """`uint64 [N, count]` numbers of `bits` bits from words `uint64 [N, w]`, the first number in the lowest bits."""
    shifts = np.arange(64 // bits, dtype=np.uint64) * np.uint64(bits)
    numbers = (words[:, :, None] >> shifts) & np.uint64((1 << bits) - 1)
    return numbers.reshape(len(words), -1)[:, :count]


def decode_quantized(packed: np.ndarray, config: Quantized) -> np.ndarray:
    """`float64 [N, k]` log-probs from `uint8 [N, B]`, `B` = `config.value_bytes`.

    May hold NaN, because the encoder fits its curve even to -inf.
    """
    exact, rest = _floats(packed, config.exact_k, config.exact_dtype)
    approximate = np.zeros((len(packed), config.k - config.exact_k))
    if config.polynomial_terms:
        coefficients, rest = _floats(rest, len(config.polynomial_terms), config.term_dtype)
        approximate += _curve(coefficients, config)
    first = 0
    for one in config.residual_bins:
        residuals, rest = _residuals(rest, one)
        approximate[:, first : first + one.num_elements] += residuals
        first += one.num_elements
    values = np.concatenate([exact, approximate], axis=1)
    return np.cumsum(values, axis=1) if config.delta_encoding else values


def decode_legacy(exact: np.ndarray, coefficients: np.ndarray, config: Legacy) -> np.ndarray:
    """`float64 [N, k]` values from `exact [N, e]` and `coefficients [N, degree + 1 (+ 1 for sqrt)]`.

    The curve's terms are `r^0, r^-1, r^-2, ...` (or `r^0, r^1, ...`) and `sqrt(r)`, at `r = 1, 2, ...`.
    """
    if config.coefficients == 0:
        return exact.astype(np.float64)
    ranks = np.arange(1, config.k - config.exact_k + 1, dtype=np.float64)
    sign = -1.0 if config.invert_polynomial else 1.0
    terms = [ranks ** (sign * power) for power in range(config.polynomial_degree + 1)]
    if config.with_sqrt_term:
        terms.append(np.sqrt(ranks))
    return np.concatenate([exact, coefficients.astype(np.float64) @ np.stack(terms)], axis=1)


def value_errors(values: np.ndarray, packed: np.ndarray | None, config: Compression) -> np.ndarray:
    """Bounds of how far the encoder's values were above `values float64 [N, k]`, which are decoded.

    An exact value is off by the last place of its type, and one with a residual by two steps of its bin, since errors
    may be handed on to the next. Nothing bounds the distance to a curve without residuals. Such a value is only known
    to be at most the last exact one, and at most `-log(rank)`, because log-probs descend.
    """
    exact = config.exact_k
    finite = np.where(np.isfinite(values), values, 0.0)
    delta = isinstance(config, Quantized) and config.delta_encoding
    stored = np.diff(finite, axis=1, prepend=0) if delta else finite
    dtype = config.exact_dtype if isinstance(config, Quantized) else "float16"
    errors = np.full(values.shape, np.inf)
    errors[:, :exact] = np.ldexp(1.0, np.frexp(stored[:, :exact])[1] - SIGNIFICANT_BITS[dtype])
    if isinstance(config, Quantized) and packed is not None:
        at = exact * FLOAT_BYTES[dtype] + len(config.polynomial_terms or ()) * FLOAT_BYTES[config.term_dtype]
        first = exact
        for one in config.residual_bins:
            if one.element_bits > 1:  # one bit holds a sign: nothing bounds the size
                errors[:, first : first + one.num_elements] = 2 * np.abs(_floats(packed[:, at:], 1, one.scale_dtype)[0])
            at += FLOAT_BYTES[one.scale_dtype] + one.packed_bytes
            first += one.num_elements
    if delta:
        errors = np.cumsum(errors, axis=1)
    most = np.broadcast_to(-np.log(np.arange(1.0, config.k + 1)), values.shape)[:, exact:]
    if exact:
        most = np.minimum(most, finite[:, exact - 1 : exact] + errors[:, exact - 1 : exact])
    errors[:, exact:] = np.minimum(errors[:, exact:], np.maximum(most - finite[:, exact:], 0))
    return np.where(np.isfinite(errors), errors, 0)


def within_mass(values: np.ndarray, *, exact: int) -> np.ndarray:
    """Descending log-probs `values float64 [N, k]`, with the approximated ones reduced to what is possible.

    No approximated value (all but the first `exact`) may be above the last exact one. If their mass does not fit beside
    the exact mass, the approximated values, and only they, are scaled down.

    At K = 50 with one exact value, on Zipf-like teachers of 3.5, 1.9 and 0.7 nats, KL(teacher || import) is 0.054,
    0.069 and 0.082 nats. With kept ids and tail scaled together it is 0.069, 0.085 and 0.133. At K = 128 with 16 exact
    values both are within 4 % of each other.
    """
    head, rest = values[:, :exact], values[:, exact:]
    if rest.shape[1] == 0:
        return values
    if exact:
        rest = np.minimum(rest, head[:, -1:])
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        room = np.maximum(1 - np.exp(head).sum(axis=1) - MIN_TAIL, MIN_TAIL)
        excess = np.log(np.exp(rest).sum(axis=1) / room)
        return np.concatenate([head, rest - np.maximum(excess, 0)[:, None]], axis=1)


def _floats(packed: np.ndarray, count: int, name: FloatName) -> tuple[np.ndarray, np.ndarray]:
    """`float64 [N, count]` from the first bytes, and the bytes after them."""
    size = count * FLOAT_BYTES[name]
    raw = np.ascontiguousarray(packed[:, :size])
    if name == "bfloat16":
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view(f"<f{FLOAT_BYTES[name]}")
    return values.reshape(len(packed), count).astype(np.float64), packed[:, size:]


def _rounded(values: np.ndarray, name: FloatName) -> np.ndarray:
    """`values` rounded to a 16-bit type; unchanged for wider types."""
    if name == "float16":
        return values.astype(np.float16).astype(np.float64)
    if name == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        halfway = np.uint32(0x7FFF) + ((bits >> 16) & 1)
        rounded = np.where(np.isfinite(values), (bits + halfway) & np.uint32(0xFFFF0000), bits)
        return rounded.astype(np.uint32).view(np.float32).astype(np.float64)
    return values


def _curve(coefficients: np.ndarray, config: Quantized) -> np.ndarray:
    """`float64 [N, k - e]`: the polynomial at each rank."""
    count, name = config.k - config.exact_k, config.term_dtype
    points = _rounded(np.linspace(0, 1, count) if config.normalize_t else np.arange(count, dtype=np.float64), name)
    total = np.zeros((len(coefficients), count))
    with np.errstate(all="ignore"):  # hostile settings overflow powers and exp; the values are checked after decoding
        for index, term in enumerate(config.polynomial_terms or ()):
            column = points ** float(term) if isinstance(term, int) else {"sqrt": np.sqrt, "exp": np.exp}[term](points)
            total += _rounded(_rounded(column, name) * coefficients[:, index : index + 1], name)
        return _rounded(total, name)


def _residuals(packed: np.ndarray, one: ResidualBin) -> tuple[np.ndarray, np.ndarray]:
    """`float64 [N, n]` residuals of a bin, and the bytes after it. One bit is -1 or 1, more bits are signed."""
    scale, rest = _floats(packed, 1, one.scale_dtype)
    levels = unpack_stream(
        np.ascontiguousarray(rest[:, : one.packed_bytes]), bits=one.element_bits, count=one.num_elements
    ).astype(np.float64)
    signed = levels * 2 - 1 if one.element_bits == 1 else levels - 2.0 ** (one.element_bits - 1)
    return signed * scale, rest[:, one.packed_bytes :]
