"""Whole captures by engines other than vLLM: what the header records of them, and what is stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.teachers.protocol import TokenSequence, scored_of
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.verify import verify
from tests.pipeline.capturing import capture_config, contents, do_units

from .serving import served


def _captured(config: CaptureConfig) -> Dataset:
    store = prepare(config).store
    do_units(config)
    seal(store)
    assert verify(store.url, deep=True, progress=False) == []
    return open_dataset(store.url)


def _assert_stored(row: CachedRow, label_logprobs: np.ndarray) -> None:
    """Within half a step of the codec's grid, or of a half outside the kept ids."""
    np.testing.assert_allclose(row.targets.label_logprob, label_logprobs, atol=0.3)


def test_a_capture_through_a_server_is_that_of_transformers_without_draws_and_records_this(tmp_path: Path) -> None:
    reference = _captured(capture_config(tmp_path, rows=12, output="reference"))
    with served(tmp_path / "teacher") as server:
        changes = {"engine": "endpoint", "endpoint": server.url, "draws": 0}
        dataset = _captured(capture_config(tmp_path, rows=12, teacher=changes))
    assert dataset.header.tail == "derived"
    assert (dataset.header.draws, dataset.header.kept_draws) == (0, 0)
    for row, wanted in zip(dataset.rows(), reference.rows(), strict=True):
        np.testing.assert_array_equal(row.token_ids, wanted.token_ids)
        _assert_stored(row, wanted.targets.label_logprob)
        assert row.targets.draw_ids.size == 0


def test_a_capture_of_answers_stores_prompts_answers_and_what_the_teacher_thought_of_them(tmp_path: Path) -> None:
    changes = {"mode": "generate", "sampling": {"n": 2, "max_tokens": 9, "temperature": 0.7, "stop": ["!"]}}
    config = capture_config(tmp_path, rows=12, **changes)
    dataset = _captured(config)
    assert dataset.header.mode == "generate"
    assert dataset.header.sampling is not None
    assert dataset.header.sampling["temperature"] == 0.7
    rows = list(dataset.rows())
    assert [row.sample_id for row in rows[:4]] == ["chat-0#0", "chat-0#1", "chat-1#0", "chat-1#1"]
    teacher = load_teacher(config.teacher, dataset.header)
    for row in rows:
        assert row.metadata["finish_reason"] in ("stop", "length")
        given = TokenSequence(
            sample_id=row.sample_id, source_row=0, token_ids=row.token_ids, target_spans=row.target_spans
        )
        (again,) = scored_of(teacher.score([given]))
        _assert_stored(row, again.targets.label_logprob)
    _captured(capture_config(tmp_path, rows=12, output="again", **changes))
    assert contents(config.output) == contents(tmp_path / "again")
