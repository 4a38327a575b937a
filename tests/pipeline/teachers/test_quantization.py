"""The quantization of a teacher: what its files and settings state, and the comparison with what was loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.teachers.engine_args import quantization_of, require_loaded
from tests import making


def _config(engine: str = "vllm", **engine_args: object) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": "m", "engine": engine, "draws": 0, "engine_args": engine_args})


def _stored(folder: Path, fields: dict[str, object]) -> Any:
    """The configuration of a model whose `config.json` has these fields too."""
    path = making.tiny_llama(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, None),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"compression_config": {"quant_method": "compressed_tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"producer": {"name": "modelopt"}, "quantization": {}}}, "modelopt"),
    ],
)
def test_the_files_of_a_model_name_its_quantization(tmp_path: Path, fields: dict[str, object], name: str) -> None:
    assert quantization_of(_config(), _stored(tmp_path, fields)) == name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (_config(quantization="fp8"), "fp8"),
        (_config(load_format="bitsandbytes"), "bitsandbytes"),
        (_config(load_format="gguf"), "gguf"),
        (_config(hf_overrides={"quantization_config": {"quant_method": "awq"}}), "awq"),
        (_config("transformers", gguf_file="model.gguf"), "gguf"),
        (_config("transformers", quantization_config={"load_in_8bit": True}), "bitsandbytes"),
        (_config("transformers", quantization_config={"quant_method": "hqq"}), "hqq"),
    ],
)
def test_the_engines_arguments_name_it_too(tmp_path: Path, config: TeacherConfig, name: str) -> None:
    assert quantization_of(config, _stored(tmp_path, {})) == name


@pytest.mark.parametrize(
    ("recorded", "loaded", "layers"),
    [
        (None, None, 0),
        ("awq", "awq_marlin", 14),
        ("gptq", "auto_gptq", 14),
        ("gptq", "gptq_marlin", None),
        ("fp8", "fp8_per_tensor", 3),
        ("modelopt", "modelopt_fp4", 3),
        ("gptq", "moe_wna16", 2),
        ("compressed-tensors", "compressed-tensors", 7),
    ],
)
def test_the_name_of_a_kernel_is_no_other_quantization(recorded: str, loaded: str, layers: int | None) -> None:
    require_loaded(_config(), recorded=recorded, loaded=loaded, layers=layers)


@pytest.mark.parametrize(
    ("recorded", "loaded", "layers"),
    [
        ("awq", "gptq", 14),
        ("fp8", None, None),  # the name says so, and vLLM loaded plain weights
        ("fp8", "fp8", 0),  # the name says so, and no layer is
        (None, "fp8", 9),
        (None, None, 9),
    ],
)
def test_another_quantization_than_the_header_s_ends_the_worker(
    recorded: str | None, loaded: str | None, layers: int | None
) -> None:
    with pytest.raises(TeacherUnusable, match=r"(?s)quantization of m in engine vllm.*choose another output"):
        require_loaded(_config(), recorded=recorded, loaded=loaded, layers=layers)


def test_weights_that_transformers_dequantized_keep_their_name() -> None:
    require_loaded(_config("transformers"), recorded="fp8", loaded=None)
    with pytest.raises(TeacherUnusable):
        require_loaded(_config("transformers"), recorded=None, loaded="fp8")
