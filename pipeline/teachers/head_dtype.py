"""Data types of a teacher's weights and logits: one decision, for the header and for the engine.

Settings and the model's own configuration in; names such as `bfloat16` out.
"""

from __future__ import annotations

from typing import Any

from coldstill.pipeline.config import TeacherConfig

_PLAIN = {"float32", "bfloat16", "float16"}


def dtype_of(config: TeacherConfig, model_config: Any) -> str:
    """Data type of the weights in the engine."""
    if config.dtype != "auto":
        return config.dtype
    return str(getattr(model_config.get_text_config(), "dtype", None) or "float32").removeprefix("torch.")


def quantization_of(config: TeacherConfig, model_config: Any) -> str | None:
    """Name of the quantisation of the weights: the one asked of the engine, or the one that they are stored in."""
    if asked := config.engine_args.get("quantization"):
        return str(asked)
    stored = getattr(model_config, "quantization_config", None)
    return str(stored.get("quant_method")) if isinstance(stored, dict) else None


def head_dtype_of(config: TeacherConfig, model_config: Any) -> str:
    """Data type of the logits: float32 where it is asked for, and by itself where the weights are float32, or plain
    halves in transformers or the tapped vLLM, whose head can be computed in float32. A bfloat16 head rounds away half
    of the order."""
    dtype = dtype_of(config, model_config)
    if config.head_dtype == "float32":
        return "float32"
    is_plain = dtype in _PLAIN and quantization_of(config, model_config) is None
    if config.head_dtype == "auto" and (dtype == "float32" or (config.can_draw and is_plain)):
        return "float32"
    return dtype
