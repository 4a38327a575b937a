"""Peak memory of a piece of work, in bytes above the level before it; GPU memory if there is a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import torch


class Peak:
    """Measures from its construction."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        self._before = _memory("VmRSS")

    def bytes(self) -> int:
        """Peak until now, in bytes above the level at construction."""
        return _memory("VmHWM") - self._before


def _memory(what: str) -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if what == "VmRSS" else torch.cuda.max_memory_allocated()
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"no {what} in /proc/self/status"
    return 1024 * int(found[1])
