"""Memory for values on their way: one set of arrays per thread, used again by each row.

A fresh array of some hundred KiB is new pages from the system each time, which cost as much as decoding into them.
"""

from __future__ import annotations

import math
import threading

import numpy as np

_MAX_BYTES = 4 << 20
"""Larger arrays are made anew and given back: they are rare, and nobody should keep them."""


class Scratch(threading.local):
    """Arrays by name. What one holds is lost when the same name is asked for again."""

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An array, not filled."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > _MAX_BYTES:
            return np.empty(shape, dtype)
        if name not in self._memory or self._memory[name].size < size:
            self._memory[name] = np.empty(size, np.uint8)
        return self._memory[name][:size].view(dtype).reshape(shape)


SCRATCH = Scratch()
