"""No engine answers with an id that only the head has: columns of padding are no tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.teachers.answer_sampling import padding_bias
from coldstill.pipeline.teachers.protocol import TokenSequence, scored_of
from coldstill.pipeline.teachers.vllm.teacher import VllmTeacher
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import About
from tests import making

TOKENS, PADDING = 258, 2000
"""Ids of the tokenizer, and further columns, which have most of a random model's mass."""


def _header(folder: Path, **changes: object) -> DatasetHeader:
    return making.tiny_header(folder, draws=0, vocab_size=TOKENS + PADDING, mode="generate", **changes)


def _prompts() -> list[TokenSequence]:
    nothing = np.empty((0, 2), np.int32)
    return [
        TokenSequence(
            sample_id=f"p{n}", source_row=n, token_ids=np.arange(4 + n, 9 + n, dtype=np.int32), target_spans=nothing
        )
        for n in range(4)
    ]


def _answers(folder: Path, engine: str, sampling: SamplingConfig) -> list[list[int]]:
    fields: dict[str, Any] = {"model": str(folder), "engine": engine, "dtype": "float32", "top_k": 8, "draws": 0}
    extra = {"engine_args": making.SMALL_ENGINE} if engine == "vllm" else {}
    config = TeacherConfig.model_validate({**fields, "max_length": 64, **extra})
    teacher = load_teacher(config, _header(folder, max_length=64), sampling)
    os.environ.pop("LD_PRELOAD", None)  # set by vLLM for its children; the other tests start children too
    answers = scored_of(teacher.score(_prompts()))
    assert len(answers) == 4 * sampling.n
    return [answer.sequence.token_ids[5:].tolist() for answer in answers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.chat_model(tmp_path_factory.mktemp("padded"), padding=PADDING, seed=3)


def test_transformers_answers_with_ids_of_the_tokenizer(folder: Path) -> None:
    answers = _answers(folder, "transformers", SamplingConfig(n=2, max_tokens=12))
    assert max(map(max, answers)) < TOKENS


@pytest.mark.parametrize("ends", [None, (1, 7)])
def test_vllm_is_told_which_columns_are_padding(folder: Path, ends: tuple[int, ...] | None) -> None:
    teacher = VllmTeacher.__new__(VllmTeacher)
    teacher._header = _header(folder, about=About(end_token_ids=ends))
    bias = teacher._limits["logit_bias"]
    assert sorted(bias) == list(range(TOKENS, TOKENS + PADDING))
    assert {*bias.values()} == {-100.0}
    assert teacher._limits.get("stop_token_ids") == (list(ends) if ends else None)
    assert padding_bias(making.tiny_header(folder)) is None


@pytest.mark.slow
def test_vllm_answers_with_ids_of_the_tokenizer_and_takes_the_most_probable_one_of_them(folder: Path) -> None:
    answers = _answers(folder, "vllm", SamplingConfig(n=2, max_tokens=12))
    assert max(map(max, answers)) < TOKENS
    greedy = SamplingConfig(max_tokens=12, temperature=0)
    assert _answers(folder, "vllm", greedy) == _answers(folder, "transformers", greedy)
