"""Facts about a teacher's weights, for the header and the engines: fingerprint, data types, quantization.

The data type of the logits is decided here alone, so that header and engine agree. Data types are names such as
`bfloat16`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from coldstill.common.plugins import is_plugin
from coldstill.pipeline.config import TeacherConfig

_WEIGHTS = ("*.safetensors", "*.bin")
_SAMPLES = 64
_SAMPLE_BYTES = 64 << 10
_PLAIN = {"float32", "bfloat16", "float16"}


def weights_fingerprint(folder: Path) -> str:
    """A digest that equal copies share, without reading hundreds of gigabytes.

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


def dtype_of(config: TeacherConfig, model_config: Any) -> str:
    """Data type of the weights in the engine."""
    if config.dtype != "auto":
        return config.dtype
    return str(getattr(model_config.get_text_config(), "dtype", None) or "float32").removeprefix("torch.")


def quantization_of(config: TeacherConfig, model_config: Any) -> str | None:
    """Name of the weights' quantization: the one set for the engine, or the one that they are stored in."""
    if configured := config.engine_args.get("quantization"):
        return str(configured)
    stored = getattr(model_config, "quantization_config", None)
    return str(stored.get("quant_method")) if isinstance(stored, dict) else None


def head_dtype_of(config: TeacherConfig, model_config: Any) -> str:
    """Data type of the logits.

    `auto` is float32 for float32 weights, and for plain half-precision weights in transformers and in vLLM with the
    tap, which can compute the head in float32: a bfloat16 head rounds away half of the order. Otherwise, and with a
    class of the user's own, it is the data type of the weights.
    """
    dtype = dtype_of(config, model_config)
    if config.head_dtype == "float32":
        return "float32"
    is_plain = dtype in _PLAIN and quantization_of(config, model_config) is None
    has_float32_head = is_plain and not is_plugin(config.engine) and config.can_draw
    if config.head_dtype == "auto" and (dtype == "float32" or has_float32_head):
        return "float32"
    return dtype
