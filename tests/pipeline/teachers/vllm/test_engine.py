"""The engine's start arguments, and the environment that it is started in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.teachers.vllm.engine import engine_arguments, set_environment
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


def test_a_gpu_gets_what_vllm_finds_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    header = making.tiny_header(making.chat_model(tmp_path / "teacher"))
    config = TeacherConfig.model_validate({"model": str(tmp_path / "teacher"), "draws": 0})
    assert "kv_cache_memory_bytes" not in engine_arguments(config, header)
