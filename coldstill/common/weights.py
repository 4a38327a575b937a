"""Digests of a model's and an adapter's files, by which headers name who scored and who wrote the rows."""

from __future__ import annotations

import hashlib
from pathlib import Path

ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WEIGHTS = ("*.safetensors", "*.bin")
_SAMPLES = 64
_SAMPLE_BYTES = 64 << 10


def weights_fingerprint(folder: Path) -> str:
    """A digest of the weights, equal for equal copies, without reading hundreds of gigabytes.

    sha256 over name, size and 64 evenly spaced samples of 64 KiB of each weight file in `folder`, and over
    `config.json`. The samples include the header at the start of a safetensors file.
    """
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.exists():
        digest.update(config.read_bytes())
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        step = max(_SAMPLE_BYTES, size // _SAMPLES)
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def hub_fingerprint(commit: str | None) -> str:
    """What stands for the digest of a model of the Hub, whose files a commit fixes."""
    return f"commit:{commit}"


def adapter_fingerprint(folder: Path) -> str:
    """sha256 over the whole settings and weights of the adapter in `folder`. Raises `OSError`."""
    digest = hashlib.sha256()
    for name in (ADAPTER_SETTINGS, ADAPTER_WEIGHTS):
        with (folder / name).open("rb") as file:
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
