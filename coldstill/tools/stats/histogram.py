"""Histograms with fixed edges, which can be added and written as JSON.

Edges never depend on the data, so that the histograms of two shards, or of two datasets, can be added and compared. A
bin holds the values `start <= value < stop`; the first bin also holds smaller ones, and the last one larger ones.
Shape letters: `B` bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, computed_field

from coldstill.storage_schema.header import MAX_TOP_K
from coldstill.storage_schema.rows import LOG_FLOOR


@dataclass(frozen=True)
class Scale:
    """`edges float64 [B + 1]`, ascending. `whole`: the values are whole numbers."""

    edges: np.ndarray
    whole: bool = False


def _counting_edges() -> np.ndarray:
    octaves = np.round(2.0 ** (np.arange(8 * 32, 20 * 32 + 2) / 32))
    return np.concatenate([np.arange(256), octaves])


ENTROPY = Scale(np.arange(169) / 20)
"""Nats in steps of 0.05 up to 8.4: the entropy of 4,096 entries and a tail is at most 8.32."""

LOGPROB = Scale(np.arange(int(10 * LOG_FLOOR), 1) / 10)
"""Nats in steps of 0.1 from the floor to 0."""

MASS = Scale(np.concatenate([[0.0], 10.0 ** (np.arange(-120, 1) / 10)]))
"""Ten bins per decade of probability from 1e-12 to 1, in even steps of log10, and one bin for all values below."""

RANK = Scale(np.array([1, *(2**n + 1 for n in range(MAX_TOP_K.bit_length()))], np.float64), whole=True)
"""1, 2, 3-4, 5-8, ..., 2,049-4,096."""

WHOLE = Scale(_counting_edges(), whole=True)
"""One bin per whole number up to 255; from there to 2^20, 32 bins per octave, each about 2% wide."""


_VALUES_PER_BLOCK = 1 << 16


class Bin(NamedTuple):
    """`values`: the number of values with `start <= value < stop`."""

    start: float
    stop: float
    values: int


class Histogram(BaseModel):
    """The number of values in each bin; empty bins are left out."""

    model_config = ConfigDict(frozen=True)

    whole: bool = Field(description="Whether the values are whole numbers.")
    bins: tuple[Bin, ...] = Field(description="[start, stop, values] for start <= value < stop, ascending.")
    total: float = Field(description="Sum of the values in the bins.")
    least: float | None = Field(description="The smallest value; null if there are no values.")
    most: float | None = Field(description="The largest value.")
    outside: int = Field(
        default=0, ge=0, description="The number of items without a value: labels that are not kept have no rank."
    )

    @property
    def count(self) -> int:
        """The number of values in the bins."""
        return sum(item.values for item in self.bins)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mean(self) -> float | None:
        """The exact mean of the values; None if there are none."""
        return self.total / self.count if self.bins else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p01(self) -> float | None:
        """The 1st percentile, at most one bin off."""
        return self.quantile(0.01)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p50(self) -> float | None:
        """The median, at most one bin off."""
        return self.quantile(0.5)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p99(self) -> float | None:
        """The 99th percentile, at most one bin off."""
        return self.quantile(0.99)

    def quantile(self, share: float) -> float | None:
        """The quantile at `share` (in 0..1), with values spread evenly over their bin. None if there are no values."""
        wanted = share * self.count
        for item in self.bins:
            if wanted <= item.values:
                value = item.start + (item.stop - item.start) * wanted / item.values
                return float(np.clip(np.floor(value) if self.whole else value, self.least, self.most))
            wanted -= item.values
        return None

    def __add__(self, other: Histogram) -> Histogram:
        """The histogram of the values of both. Raises ValueError if only one of them counts whole numbers."""
        if self.whole != other.whole:
            raise ValueError("histograms of whole numbers and of real numbers cannot be added")
        joined: dict[tuple[float, float], int] = {}
        for start, stop, values in (*self.bins, *other.bins):
            joined[start, stop] = joined.get((start, stop), 0) + values
        return Histogram(
            whole=self.whole,
            bins=tuple(Bin(start, stop, values) for (start, stop), values in sorted(joined.items())),
            total=self.total + other.total,
            least=min((value for value in (self.least, other.least) if value is not None), default=None),
            most=max((value for value in (self.most, other.most) if value is not None), default=None),
            outside=self.outside + other.outside,
        )


class Tally:
    """Counts values on a scale, array by array."""

    def __init__(self, scale: Scale):
        self._scale = scale
        self._counts = np.zeros(scale.edges.size - 1, np.int64)
        self._total = 0.0
        self._least, self._most = np.inf, -np.inf
        self._outside = 0
        self._buffer: list[np.ndarray] = []
        self._buffered_values = 0

    def add(self, values: np.ndarray, *, outside: int = 0) -> None:
        """Count `values [n]`, and `outside` items without a value. `values` must not be changed afterwards."""
        self._outside += outside
        if values.size:
            self._buffer.append(values)
            self._buffered_values += values.size
        if self._buffered_values >= _VALUES_PER_BLOCK:
            self._flush()

    def _flush(self) -> None:
        """Count the buffered values. Many short rows are counted faster together."""
        values = np.concatenate(self._buffer)
        self._buffer, self._buffered_values = [], 0
        places = np.searchsorted(self._scale.edges, values, side="right") - 1
        self._counts += np.bincount(places.clip(0, self._counts.size - 1), minlength=self._counts.size)
        self._total += float(values.sum(dtype=np.float64))
        self._least = min(self._least, float(values.min()))
        self._most = max(self._most, float(values.max()))

    def histogram(self) -> Histogram:
        """The histogram of all values so far."""
        if self._buffered_values:
            self._flush()
        edges = self._scale.edges.tolist()
        used = np.flatnonzero(self._counts).tolist()
        return Histogram(
            whole=self._scale.whole,
            bins=tuple(Bin(edges[n], edges[n + 1], int(self._counts[n])) for n in used),
            total=self._total,
            least=self._least if used else None,
            most=self._most if used else None,
            outside=self._outside,
        )
