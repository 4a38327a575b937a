"""The engine's start arguments, and the environment that it is started in."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from coldstill.pipeline.cluster.ray_cluster import gpus_per_worker
from coldstill.pipeline.config import CaptureConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.teachers.vllm.engine import Engine, engine_arguments, set_environment
from tests import making


@pytest.mark.parametrize("own", [None, 64 << 20])
def test_the_cache_of_keys_and_values_on_a_cpu_is_bounded_and_the_users_size_is_stronger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int | None
) -> None:
    """vLLM's own variable would replace the argument, and its own default is nearly all memory of the machine."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "environ", {})
    header = making.tiny_header(making.chat_model(tmp_path / "teacher"))
    named = {} if own is None else {"kv_cache_memory_bytes": own}
    config = TeacherConfig.model_validate({"model": str(tmp_path / "teacher"), "draws": 0, "engine_args": named})
    arguments = engine_arguments(config, header)
    set_environment(config, arguments)
    assert arguments["kv_cache_memory_bytes"] == (own or 1 << 30)
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ


def test_an_argument_that_vllm_does_not_take_is_an_error_for_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*, model: str) -> None:
        pytest.fail(f"it started {model}")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    with pytest.raises(TeacherUnusable, match=r"(?s)keyword argument 'no_such'.*remove that argument"):
        Engine(TeacherConfig(model="m"), {"model": "m", "no_such": 1})


def test_a_size_that_is_null_is_the_default(tmp_path: Path) -> None:
    header = making.tiny_header(making.chat_model(tmp_path / "teacher"))
    config = TeacherConfig.model_validate({"model": "m", "engine_args": {"tensor_parallel_size": None}})
    assert engine_arguments(config, header)["distributed_executor_backend"] == "uni"
    assert gpus_per_worker(CaptureConfig(output="x", source=SourceConfig(path="x"), teacher=config), {"GPU": 8}) == 1


def test_a_gpu_gets_what_vllm_finds_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    header = making.tiny_header(making.chat_model(tmp_path / "teacher"))
    config = TeacherConfig.model_validate({"model": str(tmp_path / "teacher"), "draws": 0})
    assert "kv_cache_memory_bytes" not in engine_arguments(config, header)
