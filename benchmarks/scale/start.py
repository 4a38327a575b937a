"""One start of a driver, until it would assign units, in its own process so that its memory can be read.

Reads settings, source, header, plan and names of commit records, like `coldstill capture`. Prints one JSON line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.command import new_parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Start, and print time and memory."""
    parser = new_parser("scale.start", __doc__, takes="seconds", result=None)
    parser.add_argument("config", metavar="CONFIG.yaml", help="of a capture")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    from coldstill.common.config_file import load_config
    from coldstill.pipeline.capture import remaining
    from coldstill.pipeline.config import CaptureConfig
    from coldstill.pipeline.prepare import prepare
    from coldstill.pipeline.sources.sequence_maker import SequenceMaker

    config = load_config(options.config, model=CaptureConfig, overrides=())
    SequenceMaker.of(config)  # imports torch and transformers, which any number of units needs
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    imported, base = time.monotonic(), _memory_mb("VmRSS")
    prepared = prepare(config)
    todo, rows_done = remaining(prepared)
    figures = {
        "units": len(prepared.units),
        "todo": len(todo),
        "rows_done": rows_done,
        "import_s": round(imported - begun, 2),
        "import_mb": base,
        "seconds": round(time.monotonic() - imported, 2),
        "mb": _memory_mb("VmHWM") - base,
    }
    print(json.dumps(figures))


def _memory_mb(field: str) -> int:
    """`VmRSS`: in memory now; `VmHWM`: at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
