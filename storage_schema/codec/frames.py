"""Streams as zstd frames. Byte arrays of known size in, one frame each out, and back; an empty stream is no frame.

Nothing is opened before the size that its frame declares is the size that the row's own counts demand: `zstandard`
ignores `max_output_size` where a frame declares a size, and bytes after a frame unless told.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import zstandard

from storage_schema.errors import StreamDamaged

_of_thread = threading.local()
"""A decompressor is made once per thread: no two threads may use one at a time."""

_LEVEL = 3
"""Level 19 is 3-4 % smaller and ten times slower; level 1 is 1.4 % larger (benchmarks/codec.py)."""


def compress(streams: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """One frame per stream, with its content size and checksum."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)
    return {name: compressor.compress(raw.tobytes()) if raw.size else b"" for name, raw in streams.items()}


class Frames:
    """The frames of one row, opened one by one. `frames` maps stream names to anything with the buffer protocol."""

    def __init__(self, frames: Mapping[str, object]):
        self._frames = frames
        if not hasattr(_of_thread, "decompressor"):
            _of_thread.decompressor = zstandard.ZstdDecompressor()
        self._decompressor: zstandard.ZstdDecompressor = _of_thread.decompressor

    def has(self, name: str) -> bool:
        """Whether the stream has any bytes."""
        return len(self._frames[name]) > 0  # type: ignore[arg-type]

    def open(self, name: str, size: int) -> np.ndarray:
        """`uint8 [size]`, read only: the content of a stream. Raises `StreamDamaged` unless it is of that size."""
        frame = self._frames[name]
        if not self.has(name):
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

    def bounded(self, name: str, values: np.ndarray, *, low: int, high: int) -> np.ndarray:
        """`values` of a stream; raises `StreamDamaged` unless all are in `low..high`."""
        if values.size and (values.min() < low or values.max() > high):
            raise StreamDamaged(f"stream {name}", found=f"{values.min()}..{values.max()}", wanted=f"{low}..{high}")
        return values
