"""`python -m tests.rounds.driver CONFIG.yaml`: `coldstill rounds` whose captures need no Ray."""

from __future__ import annotations

import sys

from coldstill.cli.main import main
from coldstill.rounds import run

if __name__ == "__main__":
    run.PROGRAM = "tests.rounds.without_ray"
    sys.argv[1:1] = ["rounds"]
    main()
