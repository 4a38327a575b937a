"""The endpoint engine on rows with images: a real `vllm serve`, and what another server might return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.endpoint_images import request_body, require_expansion
from coldstill.pipeline.teachers.image_expansion import RowRejected
from coldstill.pipeline.teachers.local_expansion import ExpandedRow, LocalExpander
from coldstill.pipeline.teachers.protocol import ScoredSequence, Teacher, TokenSequence, UnscoredSequence, scored_of
from coldstill.pipeline.worker import load_teacher
from tests import vision
from tests.pipeline.teachers.image_rows import CONTEXT, TOP_K, config, header, row, rows
from tests.pipeline.teachers.serving import served
from tests.pipeline.teachers.vllm_server import KEY, vllm_server

TOLERANCE = 1e-4
NO_DRAWS = {"draws": 0, "kept_draws": 0, "draw_logprobs": False}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.idefics3_model(tmp_path_factory.mktemp("teacher") / "tiles", splits=True, seed=5)


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    more = ("--enable-scale-out", "--limit-mm-per-prompt", '{"image": 8}')
    with vllm_server(folder, log, top_k=TOP_K, max_length=CONTEXT, arguments=more) as url:
        yield url


def _teacher(folder: Path, url: str | None, sampling: SamplingConfig | None = None, **changes: Any) -> Teacher:
    made = header(folder, tail="derived", **NO_DRAWS, **changes)
    settings: TeacherConfig = config(folder, "transformers", **NO_DRAWS)
    if url:
        settings = settings.model_copy(update={"engine": "endpoint", "endpoint": url, "dtype": "auto"})
    return load_teacher(settings, made, sampling)


@pytest.mark.slow
def test_values_are_those_of_the_transformers_engine(folder: Path, url: str) -> None:
    sequences = [*rows(folder), *rows(folder, loss="all")]
    ours, reference = _teacher(folder, url).score(sequences), _teacher(folder, None).score(sequences)
    for one, other, sequence in zip(ours, reference, sequences, strict=True):
        assert isinstance(one, ScoredSequence)
        assert isinstance(other, ScoredSequence)
        assert one.sequence is sequence
        for name in ("logprobs", "label_logprob"):
            np.testing.assert_allclose(getattr(one.targets, name), getattr(other.targets, name), atol=TOLERANCE)


@pytest.mark.slow
def test_answers_are_whole_and_equal_a_later_score(folder: Path, url: str) -> None:
    sampling = SamplingConfig(n=2, seed=4, max_tokens=10, temperature=0.6)
    results = _teacher(folder, url, sampling).score(rows(folder, prompts=True))
    answers = scored_of(results)
    assert len(results) == 12
    assert {one.reason for one in results if isinstance(one, UnscoredSequence)} <= {RejectReason.PLACEHOLDERS_DIFFER}
    assert {len(answer.sequence.media) for answer in answers} >= {0, 1, 2}
    assert len({answer.sequence.token_ids.tobytes() for answer in answers}) == len(answers)
    again = scored_of(_teacher(folder, None).score([answer.sequence for answer in answers]))
    for answer, wanted in zip(answers, again, strict=True):
        np.testing.assert_allclose(answer.targets.logprobs, wanted.targets.logprobs, atol=TOLERANCE)
        assert 0 < answer.targets.positions <= 10


@pytest.mark.slow
def test_a_row_that_is_too_long_with_its_images_is_rejected_and_the_others_are_scored(folder: Path, url: str) -> None:
    from transformers import AutoProcessor

    data = [vision.image_bytes(1, size=(60, 60))] * 8
    long = row(AutoProcessor.from_pretrained(folder).tokenizer, 8, "<image>" * 8 + "a" * 300, "x", data)
    first, middle, last = _teacher(folder, url).score([rows(folder)[0], long, rows(folder)[1]])
    assert isinstance(first, ScoredSequence)
    assert isinstance(last, ScoredSequence)
    assert isinstance(middle, UnscoredSequence)
    assert middle.reason is RejectReason.OVER_LONG


def test_a_server_without_that_endpoint_is_named_at_the_start_with_the_command(folder: Path) -> None:
    class Model:
        config = type("Config", (), {"vocab_size": 300, "eos_token_id": 2})

        def __call__(self, tokens: Any) -> Any:
            import torch

            generator = torch.Generator().manual_seed(0)
            return type("Output", (), {"logits": torch.randn(1, tokens.shape[1], 300, generator=generator)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.pipeline.teachers.serving.AutoModelForCausalLM.from_pretrained", lambda *_, **__: Model())
        with served(folder) as server:
            server.max_model_len = CONTEXT + 1
            made = header(folder, tail="derived", **NO_DRAWS)
            made = made.model_copy(update={"vocab_size": 300})
            settings = config(folder, "transformers", **NO_DRAWS)
            settings = settings.model_copy(
                update={"engine": "endpoint", "endpoint": server.url, "engine_args": {"attempts": 1}}
            )
            with pytest.raises(TeacherUnusable, match=r"(?s)inference/v1/generate.*--enable-scale-out"):
                load_teacher(settings, made)


@pytest.fixture(scope="module")
def expanded(folder: Path) -> tuple[LocalExpander, TokenSequence, ExpandedRow]:
    from transformers import AutoProcessor

    expander = LocalExpander(AutoProcessor.from_pretrained(folder), config(folder, "transformers"))
    sequence = rows(folder)[2]
    return expander, sequence, expander.expanded(sequence, is_prompt=False)


def _document(made: ExpandedRow) -> dict[str, Any]:
    starts = made.expansion.positions(made.expansion.images) - made.expansion.lengths + 1
    ranges = [
        {"offset": int(offset), "length": int(length)}
        for offset, length in zip(starts, made.expansion.lengths, strict=True)
    ]
    return {"prompt_token_ids": made.expansion.token_ids.tolist(), "mm_placeholders": {"image": ranges}}


def test_a_request_has_the_rows_tokens_and_the_pixels_that_every_engine_is_shown(
    expanded: tuple[LocalExpander, TokenSequence, ExpandedRow],
) -> None:
    import base64
    import io

    from PIL import Image

    _, sequence, made = expanded
    body = request_body(sequence, made, {"max_tokens": 1})
    assert body["token_ids"] == sequence.token_ids.tolist()
    for part, image in zip(body["content_parts"], made.images, strict=True):
        prefix, data = part["url"].split(",")
        assert prefix == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == image.tobytes()


def test_what_another_server_expanded_is_rejected(expanded: tuple[LocalExpander, TokenSequence, ExpandedRow]) -> None:
    expander, sequence, made = expanded
    good = _document(made)
    require_expansion(good, sequence, made, expander.rules)
    first, second = good["mm_placeholders"]["image"]
    tokens = good["prompt_token_ids"]
    inside = first["offset"] + 2
    longer = [*tokens[:inside], tokens[inside], *tokens[inside:]]
    grown = [{**first, "length": first["length"] + 1}, {**second, "offset": second["offset"] + 1}]
    for bad in (
        None,
        [],
        {},
        {**good, "prompt_token_ids": None},
        {**good, "prompt_token_ids": [*tokens[:-1], "3"]},
        {**good, "prompt_token_ids": [*tokens[:-1], 1 << 40]},
        {**good, "prompt_token_ids": [*tokens[:-1], True]},
        {**good, "prompt_token_ids": tokens[:-1]},
        {**good, "prompt_token_ids": sequence.token_ids.tolist()},
        {**good, "mm_placeholders": None},
        {**good, "mm_placeholders": {"image": [first]}},
        {**good, "mm_placeholders": {"image": [second, first]}},
        {**good, "mm_placeholders": {"image": [first, None]}},
        {**good, "mm_placeholders": {"image": [first, {"offset": -1, "length": 2}]}},
        {**good, "mm_placeholders": {"image": [first, {"offset": second["offset"]}]}},
        {"prompt_token_ids": longer, "mm_placeholders": {"image": grown}},  # of other processor settings
    ):
        with pytest.raises(RowRejected) as rejected:
            require_expansion(bad, sequence, made, expander.rules)
        assert rejected.value.reason is RejectReason.PLACEHOLDERS_DIFFER
    assert "otherwise than the processor of the header" in rejected.value.detail
    with pytest.raises(RowRejected):
        require_expansion(good, replace(sequence, media=sequence.media[:1]), made, expander.rules)
