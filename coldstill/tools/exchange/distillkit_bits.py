"""The numbers in DistillKit's bytes: packed columns of one row in, ids and log-probs out.

Shape letters: `N` positions, `k` kept ids, `e` exact values, `n` elements of a bin, `B` bytes of a position.

Written from the formulas of arcee-ai/DistillKit at a61c2e7 (distillkit/compression). A position's values, most probable
first: `e` exact floats; for the other `k - e` the curve `sum_i c_i f_i(t)` at `t = 0, 1, ...` (`f` a power, `sqrt` or
`exp`; `t / (k - e - 1)` if normalised) plus residuals `scale * q`, bin by bin. With delta encoding all values are steps
from the one before. Packed numbers are a bit stream, highest bit first, filled up to a byte at the end of each run.
The curve is rounded to the type of its coefficients where that has 16 bits, as the encoder did when it took residuals.
"""

from __future__ import annotations

import numpy as np

from .derive import MIN_TAIL
from .distillkit_config import FLOAT_BYTES, FloatName, Legacy, Quantised, ResidualBin


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


def decode_quantised(packed: np.ndarray, config: Quantised) -> np.ndarray:
    """`float64 [N, k]` log-probs from `uint8 [N, B]`, `B` = `config.value_bytes`. May hold NaN: a capture that met -inf
    fitted its curve to it."""
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


def within_mass(values: np.ndarray, *, exact: int) -> np.ndarray:
    """`values float64 [N, k]` of descending log-probs, with the approximated ones brought to what they can be.

    Of the approximated values (all but the first `exact`) none may be above the last exact one, and where they do not
    fit beside the exact mass they, and only they, are scaled down. At K = 50 with one exact value, on Zipf-like
    teachers of 3.5, 1.9 and 0.7 nats, KL(teacher || import) is 0.054, 0.069 and 0.082 nats; with kept ids and tail
    scaled together it is 0.069, 0.085 and 0.133. At K = 128 with 16 exact values both are within 4 % of each other.
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
    """`values` as the nearest ones that a 16-bit type holds; wider types are left as they are."""
    if name == "float16":
        return values.astype(np.float16).astype(np.float64)
    if name == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        halfway = np.uint32(0x7FFF) + ((bits >> 16) & 1)
        rounded = np.where(np.isfinite(values), (bits + halfway) & np.uint32(0xFFFF0000), bits)
        return rounded.astype(np.uint32).view(np.float32).astype(np.float64)
    return values


def _curve(coefficients: np.ndarray, config: Quantised) -> np.ndarray:
    """`float64 [N, k - e]`: the polynomial at each rank."""
    count, name = config.k - config.exact_k, config.term_dtype
    points = _rounded(np.linspace(0, 1, count) if config.normalize_t else np.arange(count, dtype=np.float64), name)
    total = np.zeros((len(coefficients), count))
    with np.errstate(
        all="ignore"
    ):  # powers and exp of hostile settings overflow; the values are checked after decoding
        for index, term in enumerate(config.polynomial_terms or ()):
            column = points ** float(term) if isinstance(term, int) else {"sqrt": np.sqrt, "exp": np.exp}[term](points)
            total += _rounded(_rounded(column, name) * coefficients[:, index : index + 1], name)
        return _rounded(total, name)


def _residuals(packed: np.ndarray, one: ResidualBin) -> tuple[np.ndarray, np.ndarray]:
    """`float64 [N, n]` residuals of a bin, and the bytes after it. One bit means -1 or 1; more are signed, offset."""
    scale, rest = _floats(packed, 1, one.scale_dtype)
    levels = unpack_stream(
        np.ascontiguousarray(rest[:, : one.packed_bytes]), bits=one.element_bits, count=one.num_elements
    ).astype(np.float64)
    signed = levels * 2 - 1 if one.element_bits == 1 else levels - 2.0 ** (one.element_bits - 1)
    return signed * scale, rest[:, one.packed_bytes :]
