"""The two engines on the same rows: real vLLM against real transformers. One vLLM engine for the whole file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import SourceConfig, TeacherConfig
from pipeline.errors import TeacherUnusable
from pipeline.prepare import load_tokenizer
from pipeline.sequences import TokenSequence
from pipeline.sources.chat import SequenceMaker
from pipeline.sources.readers import SourceRow
from pipeline.teachers.protocol import Teacher, load_teacher
from storage_schema.header import DatasetHeader
from storage_schema.rows import TeacherTargets
from tests import making

TOLERANCE = 1e-4  # in log-prob; both engines compute in float32
TOP_K = 16
CONTEXT = 300  # of the model, and the longest row: vLLM's one sampled token then lies beyond the context


def _config(folder: Path, engine: str, **changes: object) -> TeacherConfig:
    fields = {"model": str(folder), "engine": engine, "top_k": TOP_K, "min_prob": 0.0, "max_length": CONTEXT}
    return TeacherConfig.model_validate({**fields, "dtype": "float32", **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.chat_model(tmp_path_factory.mktemp("teacher"), seed=5, padding=0, context=CONTEXT)


@pytest.fixture(scope="module")
def header(folder: Path) -> DatasetHeader:
    return making.tiny_header(folder, top_k=TOP_K)


@pytest.fixture(scope="module")
def sequences(folder: Path) -> list[TokenSequence]:
    source = SourceConfig(path="x.jsonl", loss_on="assistant", over_long="cut")
    maker = SequenceMaker(load_tokenizer(_config(folder, "vllm")), source=source, max_length=CONTEXT)
    rows = [*making.chat_rows(12), {"text": "def f(x): return x\n" * 100}]
    made = [maker.make(SourceRow(i, row)) for i, row in enumerate(rows)]  # type: ignore[arg-type]
    assert all(isinstance(sequence, TokenSequence) for sequence in made)
    assert made[-1].token_ids.size == CONTEXT  # type: ignore[union-attr]
    return made  # type: ignore[return-value]


@pytest.fixture(scope="module")
def vllm_teacher(folder: Path, header: DatasetHeader) -> Teacher:
    teacher = load_teacher(_config(folder, "vllm", engine_args={"enforce_eager": True}), header)
    os.environ.pop("LD_PRELOAD", None)  # set by vLLM for its children; the other tests start children too
    return teacher


@pytest.fixture(scope="module")
def by_vllm(vllm_teacher: Teacher, sequences: list[TokenSequence]) -> list[TeacherTargets]:
    return vllm_teacher.score(sequences)


@pytest.fixture(scope="module")
def by_transformers(folder: Path, header: DatasetHeader, sequences: list[TokenSequence]) -> list[TeacherTargets]:
    return load_teacher(_config(folder, "transformers", draws=8), header).score(sequences)


def test_vllm_and_transformers_give_the_same_distributions(
    by_vllm: list[TeacherTargets], by_transformers: list[TeacherTargets], header: DatasetHeader
) -> None:
    for ours, reference in zip(by_vllm, by_transformers, strict=True):
        ours.check(token_count=header.token_count)
        reference.check(token_count=header.token_count)
        np.testing.assert_allclose(ours.logprobs, reference.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(ours.label_logprob, reference.label_logprob, atol=TOLERANCE)
        np.testing.assert_allclose(ours.log_tail, reference.log_tail, atol=TOLERANCE)  # derived against exact
        for n in range(ours.positions):  # equal sets, but for ids within rounding of the last kept one
            last = reference.logprobs[n, -1] + TOLERANCE
            certain = set(reference.ids[n, reference.logprobs[n] > last])
            assert certain <= set(ours.ids[n])


def test_targets_are_the_models_own_log_probs_of_the_next_token(
    folder: Path, header: DatasetHeader, sequences: list[TokenSequence], by_transformers: list[TeacherTargets]
) -> None:
    """The alignment law on a real model: position `t` scores token `t + 1`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for sequence, targets in zip(sequences, by_transformers, strict=True):
        logits = model(torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0, :, : header.token_count]
        log_softmax = torch.log_softmax(logits.double(), -1)
        scored = [t for start, stop in sequence.target_spans for t in range(start, stop)]
        wanted = [log_softmax[t, sequence.token_ids[t + 1]].item() for t in scored]
        np.testing.assert_allclose(targets.label_logprob, wanted, atol=1e-5)


def test_vllms_values_do_not_depend_on_the_order_of_rows(
    vllm_teacher: Teacher, sequences: list[TokenSequence], by_vllm: list[TeacherTargets]
) -> None:
    reversed_targets = vllm_teacher.score(sequences[::-1])[::-1]
    for first, second in zip(by_vllm, reversed_targets, strict=True):
        np.testing.assert_allclose(first.label_logprob, second.label_logprob, atol=TOLERANCE)


def test_the_same_call_gives_the_same_bits(
    vllm_teacher: Teacher, sequences: list[TokenSequence], by_vllm: list[TeacherTargets]
) -> None:
    for first, second in zip(by_vllm, vllm_teacher.score(sequences), strict=True):
        np.testing.assert_array_equal(first.ids, second.ids)
        np.testing.assert_array_equal(first.logprobs, second.logprobs)


@pytest.mark.parametrize("name", ["speculative_config", "enable_prefix_caching", "max_logprobs"])
def test_engine_arguments_that_spoil_positions_are_refused(folder: Path, header: DatasetHeader, name: str) -> None:
    with pytest.raises(TeacherUnusable, match=name):
        load_teacher(_config(folder, "vllm", engine_args={name: 1}), header)


def test_a_model_that_transformers_cannot_load_is_named(tmp_path: Path, header: DatasetHeader) -> None:
    with pytest.raises(TeacherUnusable, match="transformers loads"):
        load_teacher(_config(tmp_path, "transformers"), header)
