"""Streams as zstd frames: compression, and decompression of many rows at once under size checks.

Each stream is one frame; an empty stream has no bytes. A frame is decompressed only after its declared size equals the
size that the row's own counts require: `zstandard` ignores `max_output_size` if a frame declares a size, and by
default ignores bytes after a frame.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import zstandard

from coldstill.storage_schema.errors import StreamDamaged

from .byte_planes import ESCAPE, from_half_planes, from_planes

_of_thread = threading.local()
"""Holds one decompressor per thread: two threads must not use one at the same time."""

_LEVEL = 3
"""Level 19 is 3-4 % smaller and ten times slower; level 1 is 1.4 % larger (`make bench-codec`)."""

_MAX_SCRATCH_BYTES = 4 << 20
"""Maximum size of a reused array. Larger ones are rare, and are allocated each time."""


class Scratch(threading.local):
    """Temporary arrays by name, one set per thread, reused by each row.

    A fresh array of some hundred KiB is new pages from the system each time, which cost as much as decoding into them.
    The content of an array is lost when its name is requested again.
    """

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An uninitialized array."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > _MAX_SCRATCH_BYTES:
            return np.empty(shape, dtype)
        if name not in self._memory or self._memory[name].size < size:
            self._memory[name] = np.empty(size, np.uint8)
        return self._memory[name][:size].view(dtype).reshape(shape)


SCRATCH = Scratch()


def compress(streams: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """One frame per stream, with content size and checksum."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)
    return {name: compressor.compress(raw.tobytes()) if raw.size else b"" for name, raw in streams.items()}


class Frames:
    """The frames of some rows, decompressed stream by stream; a stream's values of all rows are joined.

    Many rows are decoded together because the overhead of numpy's calls on a row of 512 positions is as large as the
    work on its values. `rows`: stream name to anything with the buffer protocol. `positions`: target positions of each
    row.
    """

    def __init__(self, rows: Sequence[Mapping[str, object]], positions: Sequence[int]):
        self._rows = rows
        self.positions = positions
        if not hasattr(_of_thread, "decompressor"):
            _of_thread.decompressor = zstandard.ZstdDecompressor()
        self._decompressor: zstandard.ZstdDecompressor = _of_thread.decompressor

    def has(self, name: str) -> bool:
        """Whether the stream has bytes in any row."""
        return any(self._present(name))

    def totals(self, counts: np.ndarray) -> list[int]:
        """Sums of `counts [N]` over the positions of each row."""
        if len(self._rows) == 1:
            return [int(counts.sum(dtype=np.int64))]
        running = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        ends = np.cumsum(self.positions)
        return (running[ends] - running[ends - self.positions]).tolist()

    def integers(self, name: str, sizes: Sequence[int], *, width: int, low: int, high: int) -> np.ndarray:
        """`int32 [n]` from planes, `sizes` values per row. Raises `StreamDamaged` unless all are in `low..high`."""
        return bounded(name, from_planes(self._planes(name, sizes, width)), low=low, high=high)

    def counts(self, name: str, *, width: int, low: int, high: int, absent: int) -> np.ndarray | None:
        """`int32 [N]` from planes, `absent` at positions of rows without the stream; None if no row has it."""
        present = self._present(name)
        if not any(present):
            return None
        sizes = [size if there else 0 for size, there in zip(self.positions, present, strict=True)]
        values = self.integers(name, sizes, width=width, low=low, high=high)
        if all(present):
            return values
        filled = np.full(sum(self.positions), absent, np.int32)
        filled[np.repeat(present, self.positions)] = values
        return filled

    def escaped(
        self, name: str, escapes: str, sizes: Sequence[int], *, width: int, used: np.ndarray | None = None
    ) -> np.ndarray:
        """`int32 [n]` from one byte per value, and `width` planes of the excess over 255 of the escaped ones.

        `used bool [N, K]`: if given, the values are placed where it is true and the result is `[N, K]`, 0 elsewhere.
        The array is the thread's scratch memory: it is valid until the stream is read again.
        """
        short = self._planes(name, sizes, 1)[0]
        if used is not None:
            placed = SCRATCH.array("placed", used.shape, np.uint8)
            placed.fill(0)
            placed[used] = short  # as bytes: a quarter of the memory
            short = placed.reshape(-1)
            sizes = [used.shape[1] * positions for positions in self.positions]
        values = SCRATCH.array(name, short.shape, np.int32)
        values[:] = short
        places = np.flatnonzero(np.equal(short, ESCAPE, out=SCRATCH.array("escaped", short.shape, np.bool_)))
        above = from_planes(self._planes(escapes, split(places, sizes), width))
        values[places] = np.add(above, ESCAPE, out=above)
        return values if used is None else values.reshape(used.shape)

    def halves(self, name: str, sizes: Sequence[int]) -> np.ndarray:
        """`float32 [n]`: log-probs from float16. Raises `StreamDamaged` unless they are finite and not above 0."""
        values = from_half_planes(self._planes(name, sizes, 2))
        if values.size and not (np.isfinite(values).all() and values.max() <= 0):
            raise StreamDamaged(
                f"stream {name}", found="a value that is not finite or above 0", wanted="natural logs <= 0"
            )
        return values

    def require_empty(self, *names: str) -> None:
        """Raises `StreamDamaged` if one of these streams has bytes."""
        for name in names:
            if self.has(name):
                raise StreamDamaged(f"stream {name}", found="bytes", wanted="nothing: this row does not use the stream")

    def _present(self, name: str) -> list[bool]:
        return [len(row[name]) > 0 for row in self._rows]  # type: ignore[arg-type]

    def _planes(self, name: str, sizes: Sequence[int], width: int) -> np.ndarray:
        """`uint8 [width, n]`, valid until the next stream is read."""
        parts = [
            self._content(row[name], name, width * size).reshape(width, size)
            for row, size in zip(self._rows, sizes, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts, axis=1, out=SCRATCH.array("planes", (width, sum(sizes)), np.uint8))

    def _content(self, frame: object, name: str, size: int) -> np.ndarray:
        """`uint8 [size]`: the content of one frame. Raises `StreamDamaged` unless it is of that size."""
        if not len(frame):  # type: ignore[arg-type]
            if size:
                raise StreamDamaged(f"stream {name}", found="nothing", wanted=f"{size} bytes")
            return np.empty(0, np.uint8)
        try:
            declared = zstandard.frame_content_size(frame)  # type: ignore[arg-type]
            if declared != size or not size:
                raise StreamDamaged(f"stream {name}", found=f"{declared} bytes declared", wanted=f"{size} bytes")
            content = self._decompressor.decompress(frame, allow_extra_data=False)  # type: ignore[arg-type]
        except zstandard.ZstdError as error:
            raise StreamDamaged(f"stream {name}", found=str(error), wanted="one whole zstd frame") from None
        if len(content) != size:
            raise StreamDamaged(f"stream {name}", found=f"{len(content)} bytes", wanted=f"{size} bytes")
        return np.frombuffer(content, np.uint8)


def bounded(name: str, values: np.ndarray, *, low: int, high: int) -> np.ndarray:
    """`values` of a stream. Raises `StreamDamaged` unless all are in `low..high`."""
    if values.size and (values.min() < low or values.max() > high):
        raise StreamDamaged(f"stream {name}", found=f"{values.min()}..{values.max()}", wanted=f"{low}..{high}")
    return values


def split(places: np.ndarray, sizes: Sequence[int]) -> list[int]:
    """How many of the ascending indices `places` fall into each of the consecutive runs of `sizes` values."""
    if len(sizes) == 1:
        return [places.size]
    return np.diff(np.searchsorted(places, np.cumsum(sizes)), prepend=0).tolist()
