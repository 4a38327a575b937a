"""The tap where vLLM splits a teacher over processes, on real vLLM: tensor parallel, a split head.

Pipeline parallel is not run: on a CPU vLLM 0.32 fails in it by itself, its runner has no tensors between the stages.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from coldstill.pipeline.teachers.protocol import scored_of
from tests import making, vision
from tests.pipeline.teachers.parallel_engine import teacher_of


def _text_model(folder: Path) -> Path:
    return making.tiny_llama(folder, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64)


def _adapted_model(folder: Path) -> Path:
    layers = ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    making.lora_adapter(folder / "adapter", _text_model(folder), r=20, target_modules=layers)
    return folder


def _image_model(folder: Path) -> Path:
    return vision.idefics3_model(folder, splits=True, vision_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model"), [("text", _text_model), ("adapter", _adapted_model), ("images", _image_model)]
)
def test_a_teacher_split_over_processes_gives_what_a_whole_one_gives(
    tmp_path: Path, kind: str, model: Callable[[Path], Path]
) -> None:
    """Images: in chunks, and sent to the engine's process."""
    folder = model(tmp_path / "teacher")
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]  # on one NUMA node vLLM must be told
    command = [sys.executable, "-m", "tests.pipeline.teachers.parallel_engine", kind, str(folder)]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "|".join(cores), "OMP_NUM_THREADS": "1"}
    environment.pop("LD_PRELOAD", None)  # set by vLLM in a test before this one
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    subprocess.run([*command, str(tmp_path / "output")], env=environment, check=True, timeout=500)
    (first, second), facts, processes = pickle.loads((tmp_path / "output").read_bytes())
    teacher, given = teacher_of(kind, folder)
    whole = [scored.targets for scored in scored_of(teacher.score(given))]
    os.environ.pop("LD_PRELOAD", None)
    assert processes
    assert len(first) == len(second) == len(whole) == len(given)
    assert facts["canary_difference"] < 5e-5
    for split, again, alone in zip(first, second, whole, strict=True):
        np.testing.assert_array_equal(split.logprobs, again.logprobs)  # equal schedules, equal bits
        np.testing.assert_array_equal(split.draw_ids, again.draw_ids)
        np.testing.assert_allclose(np.sort(split.logprobs), np.sort(alone.logprobs), atol=1e-5)
        np.testing.assert_allclose(split.label_logprob, alone.label_logprob, atol=1e-5)
        np.testing.assert_allclose(split.log_tail, alone.log_tail, atol=1e-5)
        assert (split.draw_ids == alone.draw_ids).mean() > 0.98 if split.draw_ids.size == alone.draw_ids.size else True
