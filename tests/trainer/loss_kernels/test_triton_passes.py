"""Laws of the Triton kernels in the interpreter on a CPU, their compilation for GPUs, and the choice of passes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from coldstill.trainer.loss_kernels.logit_view import TRITON_SWITCH, PlainPasses, _checked_passes, passes_for
from tests.trainer.loss_kernels.triton_cases import CASES

triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    # Triton reads the switch where a kernel is defined: another process.
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "tests.trainer.loss_kernels.triton_cases"]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradient_are_those_of_plain_autograd_in_float64(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found["size"] > 1e-2
    assert found["values"] <= 1e-5
    assert found["gradient"] <= 5e-6


def test_every_case_of_the_other_process_is_looked_at(results: dict[str, Any]) -> None:
    assert set(results) == {*CASES, "self-check", "self-check of wrong passes"}


def test_the_self_check_lets_right_passes_through_and_wrong_ones_not(results: dict[str, Any]) -> None:
    assert results["self-check"] is True
    assert results["self-check of wrong passes"] is False


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kernel", ["_read_rows", "_write_rows"])
def test_the_kernels_compile_for_gpus(
    kernel: str, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from coldstill.trainer.loss_kernels import triton_passes

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_passes, kernel)
    sizes = {"BLOCK": triton_passes.BLOCK, "BLOCK_K": 16, "BLOCK_N": 8}
    types = {"ids": "*i64", "draws": "*i64", "labels": "*i64"}
    types |= dict.fromkeys(("vocabulary", "stride", "top_k", "most_draws"), "i32") | dict.fromkeys(sizes, "constexpr")
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "*fp32") for name in function.arg_names},
        constexprs={(function.arg_names.index(name),): size for name, size in sizes.items()},
    )
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(source, target=target, options={"num_warps": triton_passes.WARPS})
    assert len(made.asm["cubin"]) > 0


def test_a_cpu_gets_the_plain_passes() -> None:
    assert isinstance(passes_for(torch.zeros(1, 2)), PlainPasses)


def cuda_logits() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(1, 2, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which nothing goes wrong")
def test_where_triton_cannot_run_there_is_one_line_and_the_plain_passes(caplog: pytest.LogCaptureFixture) -> None:
    _checked_passes.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert isinstance(passes_for(cuda_logits()), PlainPasses)
        assert isinstance(passes_for(cuda_logits()), PlainPasses)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "without Triton" in message
    assert "cuda:0" in message
    assert "\n" not in message


def test_float64_and_the_switch_get_the_plain_passes_without_a_word(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _checked_passes.cache_clear()
    assert isinstance(passes_for(cuda_logits().double()), PlainPasses)
    monkeypatch.setenv(TRITON_SWITCH, "0")
    assert isinstance(passes_for(cuda_logits()), PlainPasses)
    assert not caplog.records


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_kernels() -> None:
    from coldstill.trainer.loss_kernels.triton_passes import TritonPasses

    _checked_passes.cache_clear()
    assert isinstance(passes_for(torch.zeros(1, 2, device="cuda")), TritonPasses)
