"""`python -m tests.rounds.without_ray COMMAND ...`: the command line with a worker in its own process instead of Ray's.

The parts of quick tests: starting Ray takes longer than all that these captures do.
"""

from __future__ import annotations

from coldstill.cli.main import main
from coldstill.pipeline.cluster import pool
from tests.pipeline.capturing import OneWorkerPool

if __name__ == "__main__":
    pool.WorkerPool = OneWorkerPool  # type: ignore[misc]
    main()
