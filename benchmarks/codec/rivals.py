"""Other codecs for a teacher's top K, each in its best form.

`NaiveLists` is Parquet list columns of int32 ids and float16 log-probs, one flat list of known shape per sequence.
`BitPacked` is ids in as few bits as the vocabulary needs, and float16 in byte planes before zstd. `peer.py` has
the third.

Shape letters: `N` target positions of a row, `V` vocabulary, `K` kept ids.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from coldstill.storage_schema.rows import CachedRow

ZSTD_LEVEL = 3


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A decoded row: `ids int32 [N, K]`, `logprobs float32 [N, K]`, `log_tail float32 [N]`."""

    ids: np.ndarray
    logprobs: np.ndarray
    log_tail: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """`bool [N, K]`: every entry, because other codecs are measured without a floor."""
        return np.ones(self.ids.shape, bool)


class Rival(Protocol):
    """A codec for rows that keep the same number of ids at every position."""

    @property
    def name(self) -> str:
        """Name in tables."""

    @property
    def top_k(self) -> int:
        """K, kept ids per position."""

    def encode(self, rows: Sequence[CachedRow]) -> list[bytes]:
        """Encode `rows` into any number of pieces."""

    def decode(self, pieces: list[bytes]) -> Iterator[Stored]:
        """Decode the pieces, row by row."""


@dataclass(frozen=True, kw_only=True)
class NaiveLists:
    """Parquet, ZSTD, single-threaded: `ids list<int32>`, `logprobs list<float16>`, `log_tail list<float16>`."""

    top_k: int
    byte_stream_split: bool = False

    @property
    def name(self) -> str:
        """Name in tables."""
        return "naive Parquet lists" + (", BYTE_STREAM_SPLIT" if self.byte_stream_split else "")

    def encode(self, rows: Sequence[CachedRow]) -> list[bytes]:
        """Encode the rows as one Parquet file."""
        targets = [row.targets for row in rows]
        columns = {
            "ids": _lists([t.ids for t in targets], np.dtype(np.int32)),
            "logprobs": _lists([t.logprobs for t in targets], np.dtype(np.float16)),
            "log_tail": _lists([t.log_tail for t in targets], np.dtype(np.float16)),
        }
        options: dict[str, Any] = {}
        if self.byte_stream_split:
            encodings = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in columns}
            options = {"use_dictionary": False, "column_encoding": encodings}
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink, compression="zstd", compression_level=ZSTD_LEVEL, **options)
        return [sink.getvalue()]

    def decode(self, pieces: list[bytes]) -> Iterator[Stored]:
        """Decode the arrays of each row, log-probs as float32."""
        table = pq.read_table(pa.BufferReader(pieces[0]), use_threads=False).combine_chunks()
        ids, logprobs, log_tail = (table.column(name).chunk(0) for name in ("ids", "logprobs", "log_tail"))
        for row in range(table.num_rows):
            halves = logprobs[row].values.to_numpy().astype(np.float32)
            tails = log_tail[row].values.to_numpy().astype(np.float32)
            kept = ids[row].values.to_numpy().reshape(tails.size, self.top_k)
            yield Stored(ids=kept, logprobs=halves.reshape(kept.shape), log_tail=tails)


@dataclass(frozen=True, kw_only=True)
class BitPacked:
    """Ids in ceil(log2 V) bits, float16 log-probs and tails in byte planes; one zstd frame each per row."""

    top_k: int
    vocabulary: int
    name: str = "bit-packed ids, float16"

    @property
    def raw_bytes(self) -> int:
        """Bytes per target before zstd, for a row with many positions."""
        return math.ceil(self.top_k * id_bits(self.vocabulary) / 8) + 2 * self.top_k + 2

    def encode(self, rows: Sequence[CachedRow]) -> list[bytes]:
        """Encode three frames per row."""
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
        pieces: list[bytes] = []
        for row in rows:
            ids = pack_bits(row.targets.ids.reshape(1, -1), bits=id_bits(self.vocabulary))
            streams = (ids, _half_planes(row.targets.logprobs), _half_planes(row.targets.log_tail))
            pieces.extend(compressor.compress(stream.tobytes()) for stream in streams)
        return pieces

    def decode(self, pieces: list[bytes]) -> Iterator[Stored]:
        """Decode the arrays of each row."""
        decompressor = zstandard.ZstdDecompressor()
        for start in range(0, len(pieces), 3):
            packed, halves, tails = (
                np.frombuffer(decompressor.decompress(p), np.uint8) for p in pieces[start : start + 3]
            )
            log_tail = _from_half_planes(tails)
            shape = (log_tail.size, self.top_k)
            ids = unpack_bits(packed[None], bits=id_bits(self.vocabulary), count=log_tail.size * self.top_k)
            logprobs = _from_half_planes(halves).reshape(shape)
            yield Stored(ids=ids.reshape(shape), logprobs=logprobs, log_tail=log_tail)


def pack_bits(values: np.ndarray, *, bits: int) -> np.ndarray:
    """`uint8 [N, ceil(n bits / 8)]` of `values [N, n]`, each below 2^bits, lowest bit first."""
    spread = (values[..., None] >> np.arange(bits, dtype=np.int32)).astype(np.uint8) & np.uint8(1)
    return np.packbits(spread.reshape(len(values), -1), axis=1, bitorder="little")


def unpack_bits(packed: np.ndarray, *, bits: int, count: int) -> np.ndarray:
    """`int32 [N, count]` from `packed uint8 [N, bytes]`; a value of up to 25 bits fits into 4 bytes."""
    place = np.arange(count, dtype=np.int64) * bits
    padded = np.concatenate([packed, np.zeros((len(packed), 3), np.uint8)], 1)
    windows = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(padded, 4, axis=1)[:, place >> 3])
    words = windows.view("<u4")[..., 0] >> (place & 7).astype(np.uint32)
    return (words & np.uint32((1 << bits) - 1)).astype(np.int32)


def id_bits(vocabulary: int) -> int:
    """Bits of one id."""
    return max(1, math.ceil(math.log2(vocabulary)))


def _lists(arrays: list[np.ndarray], dtype: np.dtype[Any]) -> pa.ListArray:
    flat = [array.astype(dtype).reshape(-1) for array in arrays]
    offsets = np.cumsum([0, *(part.size for part in flat)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(flat)))


def _half_planes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype("<f2").reshape(-1).view(np.uint8).reshape(-1, 2).T)


def _from_half_planes(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.reshape(2, -1).T).view("<f2").reshape(-1).astype(np.float32)
