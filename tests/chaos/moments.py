"""The moments of kills: at a file operation in the dataset's folder, or some time after a phase began.

A step is a file operation (open, rename, link, remove, make or list a folder) that an audit hook sees just before it
happens. Steps hit the microseconds between two calls of the store; times hit everything else.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["start", "units", "seal"]

_STEPS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"}
_MOST_STEPS = {"start": 40, "units": 200, "seal": 200}
_LONGEST_S = {"start": 0.2, "units": 0.3, "seal": 0.1}
_REMOTE = 5
"""An object store takes this many times longer."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A number of `steps`, counted by the process, or `seconds`, counted by its parent, after the start of `phase`."""

    phase: Phase
    steps: int | None = None
    seconds: float | None = None

    def arm(self, root: str, *, tell: Callable[[], None]) -> None:
        """Called by the process that will be killed when its phase begins. `tell` notifies the parent."""
        if self.steps is None:
            tell()
            return
        left = self.steps

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in _STEPS and arguments and str(arguments[0]).startswith(root):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)


def random_moment(rng: random.Random, phase: Phase, *, has_steps: bool) -> Moment:
    """A random moment. `has_steps`: whether the dataset is on a local disk."""
    if has_steps and rng.random() < 0.6:
        return Moment(phase=phase, steps=rng.randint(1, _MOST_STEPS[phase]))
    return Moment(phase=phase, seconds=rng.uniform(0, _LONGEST_S[phase] * (1 if has_steps else _REMOTE)))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, so that a campaign leaves no process behind."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
