"""The endpoint engine against a real HTTP server: values as the reference's, and every fault by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenacity.nap

from coldstill.common import retry
from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import EndpointFailed, EndpointRefused, TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.teachers import endpoint_client
from coldstill.pipeline.teachers.protocol import Teacher, TokenSequence, non_finite
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import CachedRow, TeacherTargets
from tests import making

from .serving import (
    Fault,
    ModelServer,
    cut,
    deep,
    dripping,
    garbage,
    hang_up,
    huge,
    no_http,
    refused,
    send,
    served,
    stalled,
)

TOP_K, TOLERANCE = 12, 1e-4
KEY = "sk-a-secret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights ten times the usual ones: a temperature then shows."""
    from transformers import AutoModelForCausalLM

    folder = making.chat_model(tmp_path_factory.mktemp("teacher"), seed=5, padding=0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data *= 10
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[ModelServer]:
    with served(folder) as server:
        yield server


@pytest.fixture
def server(running: ModelServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv(endpoint_client.KEY_VARIABLE, KEY)
    running.requests.clear()
    running.headers.clear()
    yield running
    running.faults, running.change, running.most_busy = [], lambda document: None, 0


def _header(folder: Path, **changes: Any) -> DatasetHeader:
    fields = {"top_k": TOP_K, "draws": 0, "tail": "derived", "max_length": 300}
    return making.tiny_header(folder, **{**fields, **changes})


def _config(folder: Path, url: str | None, **changes: Any) -> TeacherConfig:
    fields = {"model": str(folder), "engine": "endpoint" if url else "transformers", "endpoint": url, "top_k": TOP_K}
    return TeacherConfig.model_validate(
        {**fields, "dtype": "float32" if not url else "auto", "min_prob": 0.0, "max_length": 300, **changes}
    )


def _teacher(server: ModelServer, sampling: SamplingConfig | None = None, **changes: Any) -> Teacher:
    folder = Path(server.name)
    config = _config(folder, server.url, **{"engine_args": {"concurrency": 4, "attempts": 3}, **changes})
    return load_teacher(config, _header(folder), sampling)


def _sequences(count: int = 6) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    return [
        TokenSequence(
            sample_id=f"s{i}",
            source_row=i,
            token_ids=rng.integers(2, 258, 10 + 20 * i).astype(np.int32),
            target_spans=np.array([[1, 3], [5, 9 + 20 * i]], np.int32),
        )
        for i in range(count)
    ]


def _prompts(count: int = 3) -> list[TokenSequence]:
    nothing = np.empty((0, 2), np.int32)
    tokens = np.arange(5, 9, dtype=np.int32)
    return [
        TokenSequence(sample_id=f"p{i}", source_row=i, token_ids=tokens + i, target_spans=nothing) for i in range(count)
    ]


def _assert_close(ours: TeacherTargets, reference: TeacherTargets) -> None:
    np.testing.assert_array_equal(ours.ids, reference.ids)
    np.testing.assert_array_equal(ours.counts, reference.counts)
    for name in ("logprobs", "label_logprob", "log_tail"):
        np.testing.assert_allclose(getattr(ours, name), getattr(reference, name), atol=TOLERANCE)


@pytest.mark.parametrize("min_prob", [0.0, 0.02])
def test_values_are_those_of_the_transformers_engine(server: ModelServer, folder: Path, min_prob: float) -> None:
    ours = _teacher(server, min_prob=min_prob)
    reference = load_teacher(_config(folder, None, min_prob=min_prob), _header(folder))
    sequences = _sequences()
    scored = ours.score(sequences)
    assert all(one.sequence is sequence for one, sequence in zip(scored, sequences, strict=True))
    for (sequence, targets), (_, wanted) in zip(scored, reference.score(sequences), strict=True):
        targets.check(token_count=_header(folder).token_count)
        _assert_close(targets, wanted)
        assert targets.draw_ids.size == 0
        assert targets.positions == sequence.token_ids.size - 1 - 1 - 2
    assert ours.environment["served_by"] == "tests"
    assert ours.processes == ()
    assert ours.progress > len(sequences)


def test_what_is_kept_of_an_answer_equals_a_later_score_of_it(server: ModelServer, folder: Path) -> None:
    teacher = _teacher(server, SamplingConfig(temperature=0.5, n=2, max_tokens=6))
    answers = teacher.score(_prompts())
    assert [answer.sequence.sample_id for answer in answers] == ["p0#0", "p0#1", "p1#0", "p1#1", "p2#0", "p2#1"]
    scored = _teacher(server).score([answer.sequence for answer in answers])
    for (sequence, targets), again in zip(answers, scored, strict=True):
        _assert_close(targets, again.targets)
        assert sequence.metadata["finish_reason"] in ("stop", "length")
        row = CachedRow(
            sample_id=sequence.sample_id,
            token_ids=sequence.token_ids,
            target_spans=sequence.target_spans,
            targets=targets,
        )
        row.check(token_count=_header(folder).token_count)
    assert len({answer.sequence.token_ids.tobytes() for answer in answers}) == len(answers)


def test_an_answer_has_a_seed_of_its_own_and_none_of_the_servers_defaults(server: ModelServer) -> None:
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, n=2, max_tokens=3, stop=("END",))
    teacher = _teacher(server, sampling)
    server.requests.clear()
    teacher.score(_prompts())
    assert len({request["seed"] for request in server.requests}) == 6
    again = {json.dumps(request, sort_keys=True) for request in server.requests}
    server.requests.clear()
    for prompt in _prompts()[::-1]:
        teacher.score([prompt])
    assert {json.dumps(request, sort_keys=True) for request in server.requests} == again
    for request in server.requests:
        neutral = {"top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
        assert neutral.items() <= request.items()
        assert (request["temperature"], request["top_p"], request["stop"]) == (0.7, 0.9, ["END"])


def test_no_more_requests_are_under_way_than_allowed(server: ModelServer) -> None:
    _teacher(server, engine_args={"concurrency": 3}).score(_sequences() * 3)
    assert 1 < server.most_busy <= 3


@pytest.mark.parametrize("fault", [refused(429), refused(503, Retry_After="0"), cut, hang_up, no_http, garbage, deep])
def test_a_fault_that_passes_is_no_fault(server: ModelServer, fault: Fault) -> None:
    teacher = _teacher(server)
    wanted = teacher.score(_sequences(1))[0].targets
    server.faults = [fault, fault]
    np.testing.assert_array_equal(teacher.score(_sequences(1))[0].targets.logprobs, wanted.logprobs)
    assert server.faults == []


@pytest.mark.parametrize(
    ("asked", "least", "most"), [("7", 7, 7), ("999", 30, 30), ("Wed, 21 Oct 2026 07:28:00 GMT", 0, 0.01)]
)
def test_a_wait_is_as_long_as_the_server_asks_for_up_to_half_a_minute(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, asked: str, least: float, most: float
) -> None:
    teacher = _teacher(server)
    waits: list[float] = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", waits.append)
    server.faults = [refused(503, Retry_After=asked)]
    teacher.score(_sequences(1))
    assert least <= sum(waits) <= most, "a thread waits in slices"


@pytest.mark.parametrize(
    ("fault", "what"),
    [(refused(429), "status 429"), (cut, "IncompleteRead"), (hang_up, "ProtocolError"), (garbage, "begins with")],
)
def test_a_fault_that_stays_is_named_after_the_last_attempt(server: ModelServer, fault: Fault, what: str) -> None:
    teacher = _teacher(server)
    server.faults = [fault] * 3
    with pytest.raises(EndpointFailed, match=rf"row 's0'(.|\n)*{what}(.|\n)*3 attempts"):
        teacher.score(_sequences(1))
    assert server.faults == []


@pytest.mark.parametrize(("fault", "what"), [(stalled, "Read timed out"), (dripping, r"after 0\.4 s")])
def test_an_answer_that_does_not_end_in_time_is_a_fault(server: ModelServer, fault: Fault, what: str) -> None:
    teacher = _teacher(server, engine_args={"timeout_s": 0.4, "attempts": 2})
    before = teacher.progress
    server.faults = [fault] * 2
    with pytest.raises(EndpointFailed, match=what):
        teacher.score(_sequences(1))
    assert teacher.progress > before


def test_what_is_refused_is_not_asked_again_and_shows_no_key(server: ModelServer) -> None:
    teacher = _teacher(server)
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    server.faults = [refused(401), garbage]
    with pytest.raises(EndpointRefused, match=r"status 401: no: Bearer \*\*\*") as caught:
        teacher.score(_sequences(1))
    assert len(server.faults) == 1
    assert KEY not in f"{caught.value} {caught.value.__cause__}"
    assert KEY not in json.dumps(teacher.environment)


def test_an_endless_answer_is_cut_off(server: ModelServer) -> None:
    teacher = _teacher(server)
    server.faults = [huge]
    with pytest.raises(TeacherOutputInvalid, match="longer response"):
        teacher.score(_sequences(1))
    teacher.score(_sequences())  # the pool has all its connections still


def test_a_redirect_is_not_followed(server: ModelServer) -> None:
    teacher = _teacher(server)
    server.faults = [refused(307, Location="http://127.0.0.1:1/")]
    with pytest.raises(EndpointRefused, match="307"):
        teacher.score(_sequences(1))


def _row(document: dict[str, Any]) -> Any:
    return document["choices"][0]["prompt_logprobs"]


def _set_value(value: object) -> Callable[[dict[str, Any]], None]:
    return lambda document: _row(document)[2][next(iter(_row(document)[2]))].update(logprob=value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda document: document.clear(), "choices: NoneType"),
        (lambda document: document["choices"].append({}), "choices: 2"),
        (lambda document: document["choices"][0].update(prompt_logprobs=None), "NoneType"),
        (lambda document: _row(document).pop(), "9 entries"),
        (lambda document: _row(document).__setitem__(2, None), "position 1 is missing"),
        (lambda document: _row(document).__setitem__(2, {}), "position 1 is missing"),
        (lambda document: _row(document).__setitem__(2, [1, 2]), "position 1 is missing"),
        (lambda document: _row(document).__setitem__(2, {"Ġthe": {"logprob": -1.0}}), "position 1 is missing"),
        (lambda document: _row(document)[2].popitem() and _row(document)[2].popitem(), "entries at position 1"),
        (lambda document: _row(document)[2].update({str(i): {"logprob": -9.0} for i in range(30)}), "at position 1"),
        (lambda document: _row(document)[2].pop(next(iter(_row(document)[2]))), "without the label"),
        (_set_value("-1.0"), "not a number"),
        (_set_value(math.nan), "not a number"),
        (_set_value(None), "not a number"),
        (_set_value(True), "not a number"),
        (_set_value(10**400), "not a number"),
        (lambda document: [e.update(logprob=5.0) for e in _row(document)[2].values()], "mass"),
        (lambda document: [e.update(logprob=-50.0) for e in _row(document)[2].values()], "mass"),
        (lambda document: _replace_last_id(_row(document)[2]), "another model"),
    ],
)
def test_what_is_no_list_of_distributions_is_named_never_guessed(
    server: ModelServer, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    teacher = _teacher(server)
    server.change = change
    with pytest.raises(TeacherOutputInvalid, match=what) as caught:
        teacher.score(_sequences(1))
    assert "'s0'" in str(caught.value)


def _all_nan(document: dict[str, Any]) -> None:
    _row(document)[1:] = [{id_: {"logprob": math.nan} for id_ in entries} for entries in _row(document)[1:]]


def test_a_row_of_nan_is_unscored_and_a_server_of_nothing_else_is_refused(server: ModelServer) -> None:
    """Some servers write NaN. vLLM fails to, and passes Python's message on."""
    teacher = _teacher(server)
    message = b'{"error": {"message": "Out of range float values are not JSON compliant: nan"}}'
    server.faults = [lambda handler, _: send(handler, message, status=400)]
    assert teacher.score(_sequences(1)) == [non_finite("s0", 0)]
    server.change = _all_nan
    assert teacher.score(_sequences(1)) == [non_finite("s0", 0)]
    with pytest.raises(TeacherUnusable, match="NaN or infinite logits"):
        _teacher(server)


def _replace_last_id(entries: dict[str, Any]) -> None:
    entries["999999"] = entries.popitem()[1]


def test_a_log_prob_of_minus_infinity_has_no_mass(server: ModelServer) -> None:
    """vLLM writes -9999.0 for it."""
    teacher = _teacher(server)
    server.change = lambda document: list(_row(document)[2].values())[-1].update(logprob=-9999.0)
    ((_, targets),) = teacher.score(_sequences(1))
    targets.check(token_count=258)
    assert targets.counts[:2].tolist() == [TOP_K - 1, TOP_K]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda choice: choice.update(prompt_token_ids=[1, 2, 3]), "another prompt"),
        (lambda choice: choice.update(token_ids=None), "token_ids"),
        (lambda choice: choice.update(token_ids=[]), "token_ids"),
        (lambda choice: choice.update(token_ids=[5] * 99), "token_ids"),
        (lambda choice: choice.update(token_ids=[300] * 4), "token id 300"),
        (lambda choice: choice.update(token_ids=["5"] * 4), "token id '5'"),
        (lambda choice: choice.update(logprobs=None), "top_logprobs"),
        (lambda choice: choice["logprobs"]["top_logprobs"].pop(), "top_logprobs"),
        (lambda choice: choice["logprobs"]["top_logprobs"].__setitem__(0, {"a": -1.0}), "is missing"),
        (lambda choice: choice.update(finish_reason="abort"), "abort"),
    ],
)
def test_what_is_no_answer_is_named(server: ModelServer, change: Callable[[dict[str, Any]], None], what: str) -> None:
    teacher = _teacher(server, SamplingConfig(max_tokens=4))
    server.change = lambda document: change(document["choices"][0])
    with pytest.raises(TeacherOutputInvalid, match=what):
        teacher.score(_prompts(1))


def test_a_server_with_too_small_a_limit_is_refused_with_the_way_out(server: ModelServer) -> None:
    folder = Path(server.name)
    with pytest.raises(TeacherUnusable, match=r"greater than max allowed(.|\n)*--max-logprobs 30"):
        load_teacher(_config(folder, server.url, top_k=30), _header(folder, top_k=30))


def test_a_server_of_a_smaller_vocabulary_is_refused(server: ModelServer, tmp_path: Path) -> None:
    header = _header(making.chat_model(tmp_path, padding=0)).model_copy(update={"token_count": 400, "vocab_size": 400})
    with pytest.raises(TeacherUnusable, match="out of vocabulary"):
        load_teacher(_config(Path(server.name), server.url), header)


def test_a_server_of_another_model_is_refused(server: ModelServer) -> None:
    with pytest.raises(TeacherUnusable, match="served_model"):
        _teacher(server, engine_args={"served_model": "other"})


def test_a_server_of_a_shorter_context_is_refused(server: ModelServer) -> None:
    with pytest.raises(TeacherUnusable, match="max_model_len"):
        _teacher(server, max_length=512)


def test_a_server_that_gives_no_prompt_log_probs_is_refused(server: ModelServer) -> None:
    server.change = lambda document: document["choices"][0].pop("prompt_logprobs")
    with pytest.raises(TeacherUnusable, match="logprobs-mode raw_logprobs"):
        _teacher(server)


def test_a_server_whose_answers_have_tempered_log_probs_is_refused(folder: Path) -> None:
    with served(folder, processed=True) as server:
        _teacher(server)
        with pytest.raises(TeacherUnusable, match="same tokens in a prompt"):
            _teacher(server, SamplingConfig())


def test_a_server_that_is_not_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    with pytest.raises(EndpointFailed, match="2 attempts"):
        load_teacher(_config(folder, "http://127.0.0.1:9/v1", engine_args={"attempts": 2}), _header(folder))


@pytest.mark.parametrize("url", ["http://user:secret@host/v1", "http://host/v1?key=secret", "ftp://host", "host:8000"])
def test_a_url_that_is_not_plain_is_refused_and_shows_no_key(folder: Path, url: str) -> None:
    with pytest.raises(TeacherUnusable, match=r"teacher\.endpoint") as caught:
        load_teacher(_config(folder, url), _header(folder))
    assert "secret" not in str(caught.value)


def test_a_key_that_no_header_carries_is_refused_unseen(
    folder: Path, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(endpoint_client.KEY_VARIABLE, "geheim\nü")
    with pytest.raises(TeacherUnusable, match=endpoint_client.KEY_VARIABLE) as caught:
        _teacher(server)
    assert "geheim" not in str(caught.value)


def test_unknown_engine_arguments_are_named(server: ModelServer) -> None:
    with pytest.raises(TeacherUnusable, match=r"engine_args\.timeout"):
        _teacher(server, engine_args={"timeout": 3})
