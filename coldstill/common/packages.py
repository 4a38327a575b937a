"""Checks that optional packages are installed before any work starts."""

from __future__ import annotations

import importlib.util

from .errors import ColdstillError


class PackagesMissing(ColdstillError):
    """A command needs packages of an extra that is not installed."""


def require_packages(extras: str, *packages: str) -> None:
    """Raises `PackagesMissing`, with the `pip install` command that fixes it, unless all `packages` are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise PackagesMissing(
            "packages of this command",
            found=f"no {', '.join(missing)}",
            wanted=f"the extras {extras}",
            fix=f'pip install "coldstill[{extras}]"',
        )
