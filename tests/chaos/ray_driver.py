"""A whole capture on real Ray, in a separate process: `python -m tests.chaos.ray_driver CONFIG fake|real`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import yaml

from coldstill.pipeline.capture import capture
from coldstill.pipeline.cluster import pool
from coldstill.pipeline.config import CaptureConfig

from .moments import die_with_parent
from .teacher import LoadFakeTeacher

_CALL_S = 0.1


def main(config_path: str, teacher: str) -> None:
    """Capture as the command does, with the engine of the settings or with the fake teacher."""
    die_with_parent()
    config = CaptureConfig.model_validate(yaml.safe_load(Path(config_path).read_text(encoding="utf-8")))
    if teacher == "fake":
        pool.WorkerPool = partial(pool.WorkerPool, load=LoadFakeTeacher(_CALL_S))  # type: ignore[assignment, misc]
    capture(config)


if __name__ == "__main__":
    main(*sys.argv[1:])
