"""Which weights these are: a digest that two copies share, without reading hundreds of gigabytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

_WEIGHTS = ("*.safetensors", "*.bin")
_SAMPLES = 64
_SAMPLE_BYTES = 64 << 10


def weights_fingerprint(folder: Path) -> str:
    """sha256 over name, size and 64 evenly spaced samples of 64 KiB of each weight file in `folder`, and over
    `config.json`. A safetensors header at the start of a file is among the samples."""
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
