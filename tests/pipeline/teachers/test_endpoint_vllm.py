"""The endpoint engine against a real `vllm serve`, on the CPU: values and answers as the transformers engine's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.teachers.protocol import ScoredSequence, Teacher, TokenSequence, non_finite
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets
from tests import making
from tests.pipeline.teachers.vllm_server import KEY, vllm_server

pytestmark = pytest.mark.slow

TOP_K, MAX_LENGTH, TOLERANCE = 40, 120, 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.chat_model(tmp_path_factory.mktemp("teacher"), seed=5, padding=0, context=MAX_LENGTH)


@pytest.fixture(scope="module")
def header(folder: Path) -> DatasetHeader:
    return making.tiny_header(folder, top_k=TOP_K, draws=0, tail="derived", max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(folder, tmp_path_factory.mktemp("server") / "log", top_k=TOP_K, max_length=MAX_LENGTH) as url:
        yield url


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def _teacher(
    folder: Path, header: DatasetHeader, url: str | None, sampling: SamplingConfig | None = None, top_k: int = TOP_K
) -> Teacher:
    fields = {"model": str(folder), "top_k": top_k, "min_prob": 0.0, "max_length": MAX_LENGTH}
    engine = {"engine": "endpoint", "endpoint": url} if url else {"engine": "transformers", "dtype": "float32"}
    return load_teacher(TeacherConfig.model_validate({**fields, **engine}), header, sampling)


def _sequence(tokens: np.ndarray, *spans: tuple[int, int]) -> TokenSequence:
    return TokenSequence(
        sample_id=f"of {tokens.size}",
        source_row=0,
        token_ids=tokens.astype(np.int32),
        target_spans=np.array(spans, np.int32).reshape(-1, 2),
    )


def _assert_close(ours: TeacherTargets, reference: TeacherTargets) -> None:
    for name in ("logprobs", "label_logprob", "log_tail"):
        np.testing.assert_allclose(getattr(ours, name), getattr(reference, name), atol=TOLERANCE)


def test_values_are_those_of_the_transformers_engine(folder: Path, header: DatasetHeader, url: str) -> None:
    rng = np.random.default_rng(0)
    sequences = [
        _sequence(rng.integers(0, 258, length), (0, 1), (length // 2, length - 1)) for length in (3, 40, MAX_LENGTH)
    ]
    ours, reference = _teacher(folder, header, url), _teacher(folder, header, None)
    for (_, targets), (_, wanted) in zip(ours.score(sequences), reference.score(sequences), strict=True):
        targets.check(token_count=header.token_count)
        _assert_close(targets, wanted)
    assert ours.environment["served_by"] == "vllm"


def test_what_is_kept_of_an_answer_equals_a_later_score_of_it(folder: Path, header: DatasetHeader, url: str) -> None:
    sampling = SamplingConfig(temperature=0.6, top_p=0.95, n=3, max_tokens=12)
    answers = _teacher(folder, header, url, sampling).score([_sequence(np.arange(5, 20)), _sequence(np.arange(9))])
    again = _teacher(folder, header, None).score([answer.sequence for answer in answers])
    for (sequence, targets), wanted in zip(answers, again, strict=True):
        _assert_close(targets, wanted.targets)
        assert targets.positions <= 12
        assert (sequence.metadata["finish_reason"] == "stop") == (sequence.token_ids[-1] == 1)
    assert len({answer.sequence.token_ids.tobytes() for answer in answers}) == 6


def test_greedy_answers_and_stop_texts_are_those_of_the_transformers_engine(
    folder: Path, header: DatasetHeader, url: str
) -> None:
    prompts = [_sequence(np.arange(5, 20)), _sequence(np.arange(40, 70))]
    greedy = SamplingConfig(temperature=0, max_tokens=12)
    reference = _teacher(folder, header, None, greedy).score(prompts)
    written = AutoTokenizer.from_pretrained(folder).decode(reference[0].sequence.token_ids[15:])
    stop = next(letter for letter in written[3:] if letter.isascii() and letter.isprintable())
    for sampling in (greedy, greedy.model_copy(update={"stop": (stop,)})):
        ours = _teacher(folder, header, url, sampling).score(prompts)
        for one, other in zip(ours, _teacher(folder, header, None, sampling).score(prompts), strict=True):
            assert one.sequence.token_ids.tolist() == other.sequence.token_ids.tolist()
            assert one.sequence.metadata == other.sequence.metadata
            _assert_close(one.targets, other.targets)
    assert ours[0].sequence.metadata["finish_reason"] == "stop"


def test_more_log_probs_than_the_server_allows_are_refused_with_the_way_out(
    folder: Path, header: DatasetHeader, url: str
) -> None:
    with pytest.raises(TeacherUnusable, match=f"--max-logprobs {TOP_K + 1}"):
        _teacher(folder, header, url, top_k=TOP_K + 1)


def test_a_wrong_key_is_named_and_not_shown(
    folder: Path, header: DatasetHeader, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(Exception, match="401") as caught:
        _teacher(folder, header, url)
    assert "sk-wrong" not in str(caught.value)


def test_a_row_whose_logits_a_server_cannot_write_is_unscored_and_the_others_are_kept(
    folder: Path, header: DatasetHeader, tmp_path: Path
) -> None:
    """The embedding of one token is not a number. vLLM fails to write NaN as JSON, and answers with an error."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.embed_tokens.weight[200] = float("nan")
    model.save_pretrained(broken)
    tokens = [np.arange(10, 20, dtype=np.int32) for _ in range(3)]
    tokens[1][4] = 200
    spans = np.array([[2, 9]], np.int32)
    spans = np.array([[2, 9]], np.int32)
    rows = [
        TokenSequence(sample_id=f"r{i}", source_row=i, token_ids=ids, target_spans=spans)
        for i, ids in enumerate(tokens)
    ]
    with vllm_server(broken, tmp_path / "log", top_k=TOP_K, max_length=MAX_LENGTH) as url:
        results = _teacher(broken, header, url).score(rows)
    assert results[1] == non_finite("r1", 1)
    for result in (results[0], results[2]):
        assert isinstance(result, ScoredSequence)
        result.targets.check(token_count=header.token_count)
