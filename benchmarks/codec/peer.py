"""The codec of the nearest peer, arcee-ai DistillKit, written from its public description.

The description is the README ("Logit Compression" and the two recommended configurations) and the documentation of the
configuration's fields, at commit a61c2e7. Ids are bit-packed in rank order, the first log-probs are exact, and the
others are a least-squares fit over their ranks.

Shape letters: `N` target positions of a row, `V` vocabulary, `K` kept ids, `E` exact ones, `F` terms of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from benchmarks.codec.rivals import Stored, id_bits, pack_bits, unpack_bits
from coldstill.storage_schema.rows import CachedRow

Term = int | Literal["sqrt"]

LEAST_MASS = 1e-8
"""The smallest probability that the peer's own reader gives to an id outside the top K when it spreads a tail."""


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """`exact` log-probs in bfloat16; the others are fitted by float32 coefficients of `terms` of the rank 0, 1, 2, ...

    The codec stores no tail. `decode` returns 1 less the mass of the reconstructed top K, but at least `LEAST_MASS` for
    each missing id, and `kl_nats` renormalizes. With `tail`, the codec also stores the exact tail in float16.
    """

    top_k: int
    exact: int
    terms: tuple[Term, ...]
    vocabulary: int
    tail: bool = False

    @property
    def name(self) -> str:
        """The setting, as tables show it."""
        return f"polynomial, {self.exact} exact" + (", tail added" if self.tail else "")

    @property
    def raw_bytes(self) -> int:
        """Bytes per target, without compression."""
        return math.ceil(self.top_k * id_bits(self.vocabulary) / 8) + 2 * (self.exact + self.tail) + 4 * len(self.terms)

    @cached_property
    def _powers(self) -> np.ndarray:
        """`float64 [K - E, F]`."""
        ranks = np.arange(self.top_k - self.exact, dtype=np.float64)
        return np.stack([np.sqrt(ranks) if term == "sqrt" else ranks**term for term in self.terms], 1)

    @cached_property
    def _fit(self) -> np.ndarray:
        """`float64 [F, K - E]`: least squares as one matrix. Columns are scaled first: powers differ by 10^8."""
        scale = np.abs(self._powers).max(0)
        return np.linalg.pinv(self._powers / scale) / scale[:, None]

    def encode(self, rows: Sequence[CachedRow]) -> list[bytes]:
        """Encode each row as log-probs, ids and tails, each with a fixed size per position."""
        pieces = []
        for row in rows:
            order = np.argsort(-row.targets.logprobs, axis=1, kind="stable")
            values = np.take_along_axis(row.targets.logprobs, order, 1).astype(np.float32)
            coefficients = (values[:, self.exact :].astype(np.float64) @ self._fit.T).astype("<f4")
            exact = _to_bfloat16(values[:, : self.exact])
            pieces.append(np.concatenate([exact.view(np.uint8), coefficients.view(np.uint8)], 1).tobytes())
            ids = np.take_along_axis(row.targets.ids, order, 1)
            pieces.append(pack_bits(ids, bits=id_bits(self.vocabulary)).tobytes())
            pieces.append(row.targets.log_tail.astype("<f2").tobytes() if self.tail else b"")
        return pieces

    def decode(self, pieces: list[bytes]) -> Iterator[Stored]:
        """Decode the arrays of each row, in rank order."""
        value_bytes = 2 * self.exact + 4 * len(self.terms)
        powers = self._powers.T.astype(np.float32)
        for start in range(0, len(pieces), 3):
            values = np.frombuffer(pieces[start], np.uint8).reshape(-1, value_bytes)
            packed = np.frombuffer(pieces[start + 1], np.uint8).reshape(len(values), -1)
            coefficients = np.ascontiguousarray(values[:, 2 * self.exact :]).view("<f4")
            exact = _from_bfloat16(np.ascontiguousarray(values[:, : 2 * self.exact]).view("<u2"))
            logprobs = np.concatenate([exact, coefficients @ powers], 1)
            ids = unpack_bits(packed, bits=id_bits(self.vocabulary), count=self.top_k)
            log_tail = np.frombuffer(pieces[start + 2], "<f2").astype(np.float32) if self.tail else self._left(logprobs)
            yield Stored(ids=ids, logprobs=logprobs, log_tail=log_tail)

    def _left(self, logprobs: np.ndarray) -> np.ndarray:
        left = 1 - np.exp(logprobs, dtype=np.float64).sum(1)
        return np.log(np.maximum(left, LEAST_MASS * (self.vocabulary - self.top_k))).astype(np.float32)


def recommended_polynomials(vocabulary: int) -> tuple[Polynomial, Polynomial]:
    """The peer's two recommended settings: for new captures, and for a small budget."""
    return (
        Polynomial(top_k=128, exact=16, terms=(0, 1, 2, 3, 4, "sqrt"), vocabulary=vocabulary),
        Polynomial(top_k=50, exact=1, terms=(0, 1, "sqrt"), vocabulary=vocabulary),
    )


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """`uint16`: the high halves of float32, rounded to nearest, ties to even."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((words + np.uint32(0x7FFF) + ((words >> 16) & np.uint32(1))) >> 16).astype("<u2")


def _from_bfloat16(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)
