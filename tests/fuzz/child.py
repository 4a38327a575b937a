"""The process that reads mutants: `python -m tests.fuzz.child`. One folder per input line, one reading per output line.

It takes an address space of what the interpreter has after reading one sound dataset, and 1 GiB.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import resource
import sys
import time
from pathlib import Path

from . import oracle

EXTRA_BYTES = 1 << 30


def main() -> None:
    """Read folder after folder; the first is sound, and only warms the process up."""
    faulthandler.enable()
    for number, line in enumerate(sys.stdin):
        before = time.process_time()
        reading = oracle.read(Path(line.rstrip("\n")))
        answer = {**dataclasses.asdict(reading), "seconds": time.process_time() - before}
        print(json.dumps(answer), flush=True)
        if number == 0:
            limit = _address_space() + EXTRA_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
