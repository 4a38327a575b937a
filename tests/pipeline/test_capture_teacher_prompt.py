"""Laws of a whole capture whose teacher reads another prompt: its bytes, what it records of itself, and resuming."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.driver.status import read_status
from coldstill.pipeline.dry_run import dry_run
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.sources.source import open_source
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.pipeline.worker import CaptureWorker, load_for, measure_speed
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import HeaderMismatch
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.store import Store
from coldstill.tools.card.card import write_card
from coldstill.tools.derive.merge import merge
from coldstill.tools.derive.subset import subset
from coldstill.tools.inspect.terminal import show_dataset
from coldstill.tools.verify import verify
from tests import making, vision
from tests.pipeline.capturing import capture_config, contents

SYSTEM = "Answer in a sentence."
ANSWERS = {"mode": "generate", "sampling": {"n": 2, "max_tokens": 12, "temperature": 0.8, "seed": 3}}


def _config(folder: Path, output: str, *, system: str | None = SYSTEM, **changes: Any) -> CaptureConfig:
    """Chats with a system message, a hint that only some rows have, and `teacher_system` if it is given."""
    path = folder / "chats.jsonl"
    capture_config(folder, rows=23)  # makes the teacher
    if not path.exists():
        chats: list[dict[str, Any]] = making.chat_rows(23)  # type: ignore[assignment]
        for chat in chats:
            chat["messages"].insert(0, {"role": "system", "content": SYSTEM})
        making.write_jsonl(path, chats)  # type: ignore[arg-type]
    source = {"path": str(path), **({"teacher_system": system} if system else {}), **changes.pop("source", {})}
    teacher = {"max_length": 128, "draws": 6, **changes.pop("teacher", {})}
    more = {"rows_per_unit": 6, "calibration_targets": 0, **changes}
    return capture_config(folder, output=output, source=source, teacher=teacher, **more)


def _do(config: CaptureConfig, *units: int) -> None:
    worker = CaptureWorker(config)
    os.environ.pop("LD_PRELOAD", None)  # set by vLLM for its children
    for unit in units:
        worker.run(unit)


def _captured(config: CaptureConfig) -> Dataset:
    prepared = prepare(config)
    _do(config, *range(len(prepared.units)))
    seal(prepared.store)
    assert verify(config.output, deep=True, progress=False) == []
    return open_dataset(config.output)


def _assert_equal_rows(one: Dataset, other: Dataset) -> None:
    """All columns of all shards; the footers hold the headers, which differ."""
    assert len(one.shards) == len(other.shards) == 4
    for mine, theirs in zip(one.shards, other.shards, strict=True):
        paths = (Path(data.store.root, shard.file.name) for data, shard in ((one, mine), (other, theirs)))
        first, second = map(pq.read_table, paths)
        assert first.replace_schema_metadata().equals(second.replace_schema_metadata())


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_with_the_rows_own_prompt_the_rows_are_byte_for_byte_those_of_an_ordinary_capture(
    tmp_path: Path, mode: str
) -> None:
    changes = ANSWERS if mode == "generate" else {}
    ordinary = _captured(_config(tmp_path, "ordinary", system=None, **changes))
    assert ordinary.header.teacher_prompt is None
    assert b"max_read_length" not in ordinary.header.to_bytes()
    _assert_equal_rows(_captured(_config(tmp_path, "prompted", **changes)), ordinary)


def test_named_ids_are_scored_under_the_teachers_prompt_at_the_targets_of_the_row(tmp_path: Path) -> None:
    """Under the row's own prompt, the values are those of an ordinary capture; under another, those of its rows."""
    chats: list[dict[str, Any]] = making.chat_rows(23)  # type: ignore[assignment]
    plain, prompted = tmp_path / "plain.jsonl", tmp_path / "prompted.jsonl"
    with_system = [
        {**chat, "ids": [3, 250], "messages": [{"role": "system", "content": SYSTEM}, *chat["messages"]]}
        for chat in chats
    ]
    making.write_jsonl(plain, [{**chat, "ids": [3, 250]} for chat in chats])
    making.write_jsonl(prompted, with_system)  # type: ignore[arg-type]
    named = {"score_ids": "ids", "max_score_ids": 2}

    def captured(output: str, path: Path, **source: Any) -> Dataset:
        return _captured(_config(tmp_path, output, system=None, source={"path": str(path), **named, **source}))

    ordinary = captured("ordinary", prompted)
    _assert_equal_rows(captured("same prompt", prompted, teacher_system=SYSTEM), ordinary)
    another = captured("another prompt", plain, teacher_system=SYSTEM)
    assert another.header.kept_ids == "top_k_and_named"
    for mine, wanted in zip(another.rows(), ordinary.rows(), strict=True):
        assert mine.token_ids.size < wanted.token_ids.size
        assert mine.labels.tolist() == wanted.labels.tolist()
        for id_ in (3, 250):
            assert mine.targets.among_kept(np.full(mine.targets.positions, id_)).all()
        for one, other in ((mine.targets.ids, wanted.targets.ids), (mine.targets.logprobs, wanted.targets.logprobs)):
            np.testing.assert_array_equal(one, other)


VLLM = {"engine": "vllm", "dtype": "float32", "engine_args": making.SMALL_ENGINE}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["score", "generate", "public"])
def test_under_vllm_too(tmp_path: Path, way: str) -> None:
    pytest.importorskip("vllm")
    making.chat_model(tmp_path / "teacher", padding=0)  # vLLM samples padding columns of a random head too
    changes = ANSWERS if way == "generate" else {}
    teacher = {**VLLM, **({"tap": "public", "draws": 0} if way == "public" else {})}
    ordinary = _captured(_config(tmp_path, "ordinary", system=None, teacher=teacher, **changes))
    _assert_equal_rows(_captured(_config(tmp_path, "prompted", teacher=teacher, **changes)), ordinary)


LOUD = "SHOUT. " * 12


def test_rows_and_header_say_that_the_teacher_saw_more_and_so_does_all_that_shows_them(tmp_path: Path) -> None:
    dataset = _captured(_config(tmp_path, "loud", system=LOUD))
    prompt = dataset.header.teacher_prompt
    assert prompt is not None
    assert prompt.kind == "system"
    assert dataset.header.about.max_read_length == 4 * 128
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    for row, ordinary in zip(dataset.rows(), _captured(_config(tmp_path, "ordinary", system=None)).rows(), strict=True):
        np.testing.assert_array_equal(row.token_ids, ordinary.token_ids)
        np.testing.assert_array_equal(row.target_spans, ordinary.target_spans)
        assert not np.array_equal(row.targets.logprobs, ordinary.targets.logprobs)
        read = row.token_ids.size + len(LOUD) - len(SYSTEM)
        assert row.metadata == {**ordinary.metadata, "teacher_tokens": read}
        assert LOUD not in tokenizer.decode(row.token_ids)
    assert LOUD.encode() not in dataset.header.to_bytes()  # a prompt may be a secret
    said = "more than the student: another prompt than the row's, made by system"
    assert read_status(str(dataset.store.url)).teacher_saw == said
    assert read_status(str(tmp_path / "ordinary")).teacher_saw is None
    console = Console(record=True, width=200)
    show_dataset(dataset.store.url, console=console)
    assert said in console.export_text()
    write_card(dataset.store.url)
    card = Path(dataset.store.root, "README.md").read_text()
    assert "the teacher saw more than the student" in card
    assert prompt.sha256 in card
    part = subset(dataset.store.url, tmp_path / "part", rows="0:5", progress=False)
    assert part.header.teacher_prompt == prompt
    with pytest.raises(HeaderMismatch, match="teacher_prompt"):
        merge([dataset.store.url, tmp_path / "ordinary"], tmp_path / "merged", progress=False)


@pytest.mark.parametrize("changes", [{}, ANSWERS], ids=["score", "generate"])
def test_a_capture_in_parts_equals_an_unbroken_one_and_another_prompt_cannot_resume_it(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    _captured(_config(tmp_path, "unbroken", system=LOUD, **changes))
    config = _config(tmp_path, "parts", system=LOUD, **changes)
    prepare(config)
    _do(config, 2)
    with pytest.raises(HeaderMismatch, match="teacher_prompt"):
        prepare(_config(tmp_path, "parts", system="Whisper.", **changes))
    with pytest.raises(HeaderMismatch, match="max_read_length"):
        prepare(_config(tmp_path, "parts", system=LOUD, teacher={"max_read_length": 200}, **changes))
    prepare(config)
    _do(config, 0, 1)
    _do(config, 3, 2)
    seal(Store(config.output))
    assert contents(config.output) == contents(tmp_path / "unbroken")


def test_rows_without_the_teachers_prompt_are_rejected_and_the_others_captured(tmp_path: Path) -> None:
    rows: list[Any] = making.chat_rows(12)
    for number, row in enumerate(rows):
        row["hint"] = f"The result is {number + number * number}." if number % 3 else ""
    config = _config(tmp_path, "hints", system=None)
    making.write_jsonl(tmp_path / "hints.jsonl", rows)
    source = {"path": str(tmp_path / "hints.jsonl"), "teacher_prompt": "hint"}
    dataset = _captured(config.model_copy(update=_config(tmp_path, "hints", system=None, source=source).__dict__))
    assert [row.sample_id for row in dataset.rows()] == [f"chat-{number}" for number in range(12) if number % 3]
    assert all("hint" not in row.metadata for row in dataset.rows())
    (name, *_) = contents(dataset.store.root, "rejects")
    reject = json.loads(Path(dataset.store.root, "rejects", name).read_text().splitlines()[0])
    assert (reject["sample_id"], reject["reason"]) == ("chat-0", "no_teacher_prompt")


@pytest.mark.parametrize("changes", [{}, ANSWERS], ids=["score", "generate"])
def test_a_dry_run_and_its_probe_count_what_the_teacher_reads(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = _config(tmp_path, "dry", system=LOUD, **changes)
    dry = dry_run(config, progress=False)
    maker = SequenceMaker.of(config)
    rows = open_source(config.source).rows()
    sequences = [made for made in maker.sequences(rows) if isinstance(made, TokenSequence)]
    dataset = _captured(config)
    report = measure_speed(load_for(config, dataset.header), dataset.header, sequences, seconds=0.1)
    first = [row.metadata["teacher_tokens"] for row in dataset.rows()]
    if not changes:
        assert dry.tokens == sum(first)
        assert dry.targets == sum(row.targets.positions for row in dataset.rows())
        assert report.tokens in (sum(first[:8]), sum(first[8:]))
    else:
        answers = sum(row.targets.positions for row in dataset.rows())
        assert sum(first) == 2 * dry.tokens + answers
        assert report.tokens > dry.tokens / 2
        assert dry.targets == 23 * 2 * 12


def _data_uri(seed: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(vision.image_bytes(seed, size=(40, 50))).decode()}"


def test_rows_with_images_are_read_after_the_teachers_prompt_with_the_same_images(tmp_path: Path) -> None:
    """The column of images serves both sides; a chat of the teacher with another image is rejected."""
    model = vision.idefics3_model(tmp_path / "tiles", splits=True, seed=2)
    (tmp_path / "teacher").mkdir()
    rows: list[Any] = []
    for number in range(5):
        image = _data_uri(number)
        question = {"role": "user", "content": "<image>Which number?" if number % 2 else "Which?"}
        chat = [question, {"role": "assistant", "content": f"It is {number}."}]
        seen = [{**question, "content": f"It is {number}. {question['content']}"}, chat[1]]
        rows.append({"id": str(number), "messages": chat, "seen": seen, "images": [image] if number % 2 else []})
    parts = [[{"type": "image", "image": _data_uri(seed)}, {"type": "text", "text": "Which?"}] for seed in (7, 8)]
    own, seen = ([{"role": "user", "content": content}, rows[0]["messages"][1]] for content in parts)
    rows.append({"id": "5", "messages": own, "seen": seen, "images": []})
    making.write_jsonl(tmp_path / "rows.jsonl", rows)

    def captured(output: str, **source: Any) -> Dataset:
        source["path"] = str(tmp_path / "rows.jsonl")
        teacher = {"model": str(model), "max_length": 200}
        changes = {"source": source, "teacher": teacher, "output": str(tmp_path / output)}
        return _captured(capture_config(tmp_path, calibration_targets=0, **changes))

    ordinary = {row.sample_id: row for row in captured("ordinary").rows()}
    prompted = captured("prompted", teacher_messages="seen")
    found = {row.sample_id: row for row in prompted.rows()}
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert [len(row.media) for row in found.values()] == [0, 1, 0, 1, 0]
    for name, row in found.items():
        np.testing.assert_array_equal(row.token_ids, ordinary[name].token_ids)
        assert row.media == ordinary[name].media
        assert not np.array_equal(row.targets.label_logprob, ordinary[name].targets.label_logprob)
        assert row.metadata["teacher_tokens"] > row.token_ids.size
    (path,) = Path(prompted.store.root, "rejects").iterdir()
    reject = json.loads(path.read_text())
    assert (reject["sample_id"], reject["reason"]) == ("5", "bad_images")
