"""Laws of engine arguments: what changes values is part of a dataset's identity, and nothing else of them is."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.teachers.endpoint_teacher import EndpointArguments
from coldstill.pipeline.teachers.engine_args import engine_args_that_change_values
from coldstill.storage_schema.errors import HeaderMismatch
from coldstill.storage_schema.header import HEADER_NAME
from tests.pipeline.capturing import capture_config

CHANGING = {
    "vllm": {
        "hf_overrides": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rms_norm_eps": 1e-5},
        "kv_cache_dtype": "fp8",
        "attention_backend": "TRITON_ATTN",
        "quantization": "fp8",
        "load_format": "dummy",
        "seed": 1,
        "mm_processor_device": "cuda",
        "mm_device_do_normalize": True,
        "mm_encoder_attn_dtype": "fp8",
        "mm_encoder_attn_backend": "TORCH_SDPA",
        "an_argument_of_a_later_release": True,
    },
    "transformers": {"attn_implementation": "eager", "torch_dtype": "bfloat16", "rope_parameters": {"factor": 2.0}},
    "endpoint": {"served_model": "another"},
    "my_module:MyTeacher": {"temperature": 2.0},
}
FREE = {
    "vllm": {
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "mm_encoder_tp_mode": "data",
        "skip_mm_profiling": True,
        "disable_chunked_mm_input": True,
    },
    "transformers": {"device_map": "auto", "low_cpu_mem_usage": True},
    "endpoint": {"concurrency": 2, "timeout_s": 10.0, "attempts": 1},
}


@pytest.mark.parametrize(("engine", "name"), [(engine, name) for engine in CHANGING for name in CHANGING[engine]])
def test_an_argument_that_changes_values_or_is_unknown_counts(engine: str, name: str) -> None:
    found = engine_args_that_change_values(engine, {name: CHANGING[engine][name], **FREE.get(engine, {})})
    assert found.pop("engine", engine) == engine
    assert found == {name: CHANGING[engine][name]}


@pytest.mark.parametrize("engine", FREE)
def test_memory_placement_and_concurrency_do_not_count(engine: str) -> None:
    assert engine_args_that_change_values(engine, FREE[engine]) == {}


def test_every_argument_of_an_endpoint_but_the_served_model_is_free() -> None:
    every = EndpointArguments(served_model="m").model_dump()
    assert engine_args_that_change_values("endpoint", every) == {"served_model": "m"}


def test_the_users_own_class_counts_by_its_name() -> None:
    assert engine_args_that_change_values("mine:A", {}) != engine_args_that_change_values("mine:B", {})


def test_equal_arguments_are_equal_json_in_any_order_and_spelling_of_numbers() -> None:
    first = {"hf_overrides": {"b": (1, 2), "a": 1.0}, "seed": 3}
    second = {"seed": 3.0, "hf_overrides": {"a": 1, "b": [1, 2]}}
    texts = {json.dumps(engine_args_that_change_values("vllm", arguments)) for arguments in (first, second)}
    assert len(texts) == 1


SECRETS: list[dict[str, Any]] = [
    {"hf_token": "hf_abcdefghijklmnopqrstuvwx"},
    {"token": "s3cret"},
    {"api_key": "s3cret"},
    {"hf_overrides": {"password": "s3cret"}},
    {"additional_config": {"url": "https://user:s3cret@host/x"}},
    {"additional_config": {"note": "hf_abcdefghijklmnopqrstuvwx"}},
]


@pytest.mark.parametrize("arguments", SECRETS)
@pytest.mark.parametrize("engine", ["vllm", "transformers", "mine:Teacher"])
def test_a_secret_never_enters(engine: str, arguments: dict[str, Any]) -> None:
    text = json.dumps(engine_args_that_change_values(engine, arguments))
    assert "s3cret" not in text
    assert "hf_abcdefghijkl" not in text


def test_ids_of_tokens_are_no_secrets() -> None:
    arguments = {"hf_overrides": {"eos_token_id": 3, "max_tokens": 9}}
    assert engine_args_that_change_values("vllm", arguments) == arguments


@pytest.mark.parametrize("path", ["/home/someone/models/draft", "~/models/draft", "./models/draft/"])
def test_of_a_local_path_only_the_last_part_is_kept(path: str) -> None:
    assert engine_args_that_change_values("vllm", {"speculator": path}) == {"speculator": "draft (a local path)"}


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), float("nan"), b"bytes", {1, 2}])
def test_a_value_that_is_not_json_is_named(value: object) -> None:
    with pytest.raises(TeacherUnusable, match=r"teacher\.engine_args\.x\.y") as refused:
        engine_args_that_change_values("vllm", {"x": {"y": value}})
    assert "do:" in str(refused.value)


def test_a_restart_with_another_value_is_refused_and_with_another_free_argument_is_not(tmp_path: Path) -> None:
    started = capture_config(tmp_path, teacher={"engine_args": {"attn_implementation": "eager"}})
    prepared = prepare(started)
    assert prepared.header.teacher.engine_args == {"attn_implementation": "eager"}
    prepare(capture_config(tmp_path, teacher={"engine_args": {"attn_implementation": "eager", "device_map": "cpu"}}))
    for others in ({}, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager", "rope_scaling": None}):
        with pytest.raises(HeaderMismatch, match=r"the configuration: teacher\.engine_args\.") as refused:
            prepare(capture_config(tmp_path, teacher={"engine_args": others}))
        assert "restore it" in refused.value.fix
    assert str(tmp_path) not in Path(started.output, HEADER_NAME).read_text()
