"""`python -m coldstill`: the same as the command `coldstill`."""

from __future__ import annotations

from .cli.main import run

run()
