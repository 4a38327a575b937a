"""Laws of the preparation: the header records the settings, and later starts are compared with it."""

from __future__ import annotations

import gzip
import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coldstill.pipeline.config import CaptureConfig, TeacherConfig
from coldstill.pipeline.errors import SourceChanged, TemplateCannotMark
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.sources.source import open_source
from coldstill.pipeline.sources.staging import remove_staging
from coldstill.pipeline.teachers.checkpoint import dtype_of, head_dtype_of
from coldstill.pipeline.teachers.engine_args import quantization_of
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import HeaderMismatch
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.header_facts import About
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.store import Store
from coldstill.tools.verify import verify
from tests import making
from tests.pipeline.capturing import capture_config, do_units


def _model(dtype: str | None, quantization: dict[str, str] | None = None) -> Any:
    text = SimpleNamespace(dtype=f"torch.{dtype}" if dtype else None)
    return SimpleNamespace(get_text_config=lambda: text, quantization_config=quantization)


TAP: dict[str, Any] = {"engine": "vllm"}


@pytest.mark.parametrize(
    ("settings", "model", "head"),
    [
        (TAP, _model("bfloat16"), "float32"),
        (TAP, _model("float16"), "float32"),
        (TAP, _model("float32"), "float32"),
        (TAP, _model(None), "float32"),
        (TAP, _model("bfloat16", {"quant_method": "awq"}), "bfloat16"),
        ({**TAP, "engine_args": {"quantization": "fp8"}}, _model("bfloat16"), "bfloat16"),
        ({**TAP, "tap": "public"}, _model("bfloat16"), "bfloat16"),
        ({**TAP, "head_dtype": "model"}, _model("bfloat16"), "bfloat16"),
        ({**TAP, "dtype": "float16", "head_dtype": "model"}, _model("bfloat16"), "float16"),
        ({**TAP, "tap": "public", "head_dtype": "float32"}, _model("bfloat16"), "float32"),
        ({"engine": "transformers"}, _model("bfloat16"), "float32"),
        ({"engine": "transformers"}, _model("float32"), "float32"),
        ({"engine": "transformers", "head_dtype": "float32"}, _model("bfloat16"), "float32"),
        ({"engine": "endpoint", "endpoint": "http://x/v1"}, _model("bfloat16"), "bfloat16"),
    ],
)
def test_logits_are_float32_where_it_is_asked_for_or_the_engine_can(
    settings: dict[str, Any], model: Any, head: str
) -> None:
    assert head_dtype_of(TeacherConfig(model="m", **settings), model) == head


def test_a_quantization_of_the_settings_or_the_checkpoint_is_recorded() -> None:
    asked = TeacherConfig(model="m", engine_args={"quantization": "fp8"})
    assert quantization_of(asked, _model("bfloat16")) == "fp8"
    assert quantization_of(TeacherConfig(model="m"), _model("bfloat16", {"quant_method": "awq"})) == "awq"
    assert quantization_of(TeacherConfig(model="m"), _model("bfloat16")) is None
    assert dtype_of(TeacherConfig(model="m", dtype="float16"), _model("bfloat16")) == "float16"


def test_the_header_records_the_mode_and_its_settings(tmp_path: Path) -> None:
    scored = prepare(capture_config(tmp_path, order="fast", teacher={"draw_logprobs": True})).header
    assert (scored.mode, scored.order, scored.draw_logprobs, scored.tail) == ("score", "fast", True, "exact")
    assert (scored.documents, scored.sampling, scored.loss_on) == (None, None, "assistant")
    sampling = {"temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 5, "max_tokens": 8, "stop": ["\n"]}
    answered = prepare(capture_config(tmp_path, output="answered", mode="generate", sampling=sampling)).header
    assert (answered.mode, answered.sampling, answered.loss_on) == ("generate", sampling, "last_turn")
    making.write_jsonl(tmp_path / "rows.jsonl", [{"text": "abc"}])
    for documents in ("isolate", "concat"):
        config = capture_config(tmp_path, output=documents, mode="pretrain", documents=documents)
        header = prepare(config).header
        assert (header.mode, header.documents, header.loss_on) == ("pretrain", documents, "all")
        assert (header.sampling, header.chat_template_sha256) == (None, None)
        assert header.over_long == ("cut" if documents == "isolate" else "split")


@pytest.mark.parametrize(
    ("teacher", "tail"),
    [
        ({"engine": "vllm"}, "exact"),
        ({"engine": "vllm", "tap": "public", "draws": 0}, "derived"),
        ({"engine": "endpoint", "endpoint": "http://x/v1", "draws": 0}, "derived"),
    ],
)
def test_the_tail_is_exact_where_the_engine_can_draw(tmp_path: Path, teacher: dict[str, Any], tail: str) -> None:
    assert prepare(capture_config(tmp_path, teacher=teacher)).header.tail == tail


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mode": "generate"}, "mode"),
        ({"order": "fast"}, "order"),
        ({"source": {"template_arguments": {"x": 1}}}, "chat_template"),
        ({"teacher": {"engine": "vllm", "tap": "public", "draws": 0}}, "draws"),
    ],
)
def test_a_changed_setting_on_an_existing_dataset_is_named(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    prepare(capture_config(tmp_path))
    with pytest.raises(HeaderMismatch, match=field):
        prepare(capture_config(tmp_path, **changes))


def test_other_columns_on_an_existing_dataset_are_named(tmp_path: Path) -> None:
    prepare(capture_config(tmp_path))
    with pytest.raises(SourceChanged, match=r"source\.prompt"):
        prepare(capture_config(tmp_path, source={"prompt": "question"}))


def test_a_staged_source_is_staged_once_and_a_change_of_it_is_named(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    staged = capture_config(tmp_path, source={"path": str(packed)})
    first = prepare(staged)
    part = Path(config.output, "staging", "000000.parquet")
    before = part.stat().st_ino
    os.utime(packed, (1, 1))
    assert prepare(staged).header == first.header
    assert part.stat().st_ino == before
    packed.write_bytes(gzip.compress(b'{"text": "another"}\n'))
    with pytest.raises(HeaderMismatch, match="source_sha256") as changed:
        prepare(staged)
    assert "put the files of the source back" in changed.value.fix


def test_a_staged_source_that_was_deleted_is_staged_again_from_the_same_source_alone(tmp_path: Path) -> None:
    packed = tmp_path / "rows.jsonl.gz"
    config = capture_config(tmp_path, source={"path": str(packed)})
    whole = gzip.compress((tmp_path / "rows.jsonl").read_bytes())
    packed.write_bytes(whole)
    first = prepare(config)
    remove_staging(first.store)
    packed.write_bytes(gzip.compress(b'{"text": "another"}\n'))
    with pytest.raises(HeaderMismatch, match="source_sha256"):
        prepare(config)
    assert first.store.names("staging") == []
    packed.write_bytes(whole)
    again = prepare(config)
    assert again.units == first.units
    assert again.store.names("staging") == ["000000.parquet", "source.json"]


def test_a_sealed_dataset_is_prepared_without_staging(tmp_path: Path) -> None:
    packed = tmp_path / "rows.jsonl.gz"
    config = capture_config(tmp_path, source={"path": str(packed)})
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    prepare(config)
    do_units(config)
    seal(Store(config.output))
    remove_staging(Store(config.output))
    again = prepare(config)
    assert again.store.names("staging") == []
    assert len(again.units) == 5


def test_a_template_that_can_mark_none_of_the_first_rows_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    chats = making.chat_rows(6)
    rows = [{"messages": [*one["messages"], *other["messages"]]} for one, other in itertools.pairwise(chats)]  # type: ignore[misc]
    making.write_jsonl(tmp_path / "rows.jsonl", rows)
    template = tmp_path / "rewrites.jinja"
    template.write_text("{% for m in messages %}{{ m.content if loop.last else '~' ~ m.content }}</s>{% endfor %}")
    changed = capture_config(tmp_path, source={"chat_template": str(template)})
    with pytest.raises(TemplateCannotMark, match="rewritten"):
        prepare(changed)
    assert not Path(config.output).exists()


def test_one_row_that_cannot_be_marked_is_a_reject_wherever_it_is(tmp_path: Path) -> None:
    """It is the first of the rows that are checked, and the template can mark the others, whose chats have one turn."""
    rows = making.chat_rows(4)
    rows.insert(0, {"messages": [*rows[0]["messages"], *rows[1]["messages"]]})  # type: ignore[index]
    template = tmp_path / "rewrites.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '~' ~ m.content }}</s>{% endfor %}"
    )
    config = capture_config(tmp_path, source={"chat_template": str(template)})
    making.write_jsonl(tmp_path / "rows.jsonl", rows)
    prepare(config)
    made = list(SequenceMaker.of(config).sequences(open_source(config.source).rows()))
    assert [made[0].reason, *map(type, made[1:])] == ["template_cannot_mark", *[TokenSequence] * 4]  # type: ignore[union-attr]


def test_a_capture_that_was_begun_in_format_1_ends_in_format_1(tmp_path: Path) -> None:
    config = capture_config(tmp_path, license="MIT")
    begun = prepare(config)
    plain = {"draw_method": "iid", "draw_from": "softmax", "draw_number": "fixed"}  # format 1 has no other draws
    old = begun.header.model_copy(update={"format_version": 1, "about": About(license="MIT"), **plain})
    begun.store.put(HEADER_NAME, old.to_bytes())

    assert prepare(config).header == old
    do_units(config)
    assert seal(Store(config.output)).format_version == 1

    dataset = open_dataset(config.output)
    assert dataset.header == old
    assert len(dataset.faithfulness_sample()) > 0
    assert verify(config.output, deep=True, progress=False) == []


def test_the_header_records_how_draws_are_made(tmp_path: Path) -> None:
    systematic = prepare(capture_config(tmp_path)).header
    assert (systematic.draw_method, systematic.draw_from, systematic.draw_number) == (
        "systematic",
        "tail",
        "by_tail_mass",
    )
    for name, changes in (("independent", {"draw_method": "iid"}), ("none", {"draws": 0})):
        assert prepare(capture_config(tmp_path, output=name, teacher=changes)).header.has_plain_draws


def test_a_capture_has_the_draws_that_its_header_records(tmp_path: Path) -> None:
    """The number is D times the tail's mass, rounded up or down; the tail is known to half a step of the grid."""
    config = capture_config(tmp_path, rows=12, teacher={"draws": 32, "top_k": 6})
    store = prepare(config).store
    do_units(config)
    seal(store)
    counts, wanted = [], []
    for row in open_dataset(config.output).rows():
        counts.append(row.targets.draw_counts)
        wanted.append(32 * np.exp(row.targets.log_tail, dtype=np.float64))
    assert np.abs(np.concatenate(counts) - np.concatenate(wanted)).max() < 1.5
    assert np.concatenate(counts).mean() == pytest.approx(np.concatenate(wanted).mean(), abs=0.1)


def test_a_capture_of_an_earlier_release_resumes_with_the_draws_that_it_was_started_with(tmp_path: Path) -> None:
    """Its draws were independent, and at most 32 of them were kept; the configuration says nothing about either."""
    old = {"draws": 64, "draw_method": "iid", "kept_draws": 32}
    begun = prepare(capture_config(tmp_path, teacher=old))
    config = capture_config(tmp_path, teacher={"draws": 64})
    assert prepare(config).header == begun.header
    do_units(config)
    assert seal(begun.store).rows == 40
    other = capture_config(tmp_path, teacher={"draws": 64, "draw_method": "systematic"})
    with pytest.raises(HeaderMismatch) as raised:
        prepare(other)
    assert "teacher.draw_method: iid" in raised.value.fix


def test_a_capture_started_with_older_defaults_resumes_with_the_keys_that_the_error_names(tmp_path: Path) -> None:
    """Earlier releases had other defaults: `teacher.top_k` 64 and `teacher.draws` 0."""
    first = prepare(capture_config(tmp_path, teacher={"top_k": 64, "draws": 0, "max_length": 200}))
    document = capture_config(tmp_path).model_dump(exclude_unset=True)
    for key in ("top_k", "draws"):
        del document["teacher"][key]
    with pytest.raises(HeaderMismatch) as raised:
        prepare(CaptureConfig.model_validate(document))
    advice = raised.value.fix
    assert "set teacher.top_k: 64, teacher.draws: 0, teacher.max_length: 200, or choose another output" in advice
    document["teacher"] |= {"top_k": 64, "draws": 0, "max_length": 200}
    assert prepare(CaptureConfig.model_validate(document)).header == first.header


@pytest.mark.parametrize(
    ("old", "now", "advice"),
    [
        ({"top_k": 16, "draws": 64}, {"draws": 64}, "set teacher.top_k: 16, or"),
        ({"top_k": 16, "draws": 32}, {"draws": 64}, "set teacher.top_k: 16, teacher.draws: 32, or"),
    ],
)
def test_a_default_capture_of_an_earlier_release_is_resumed_by_the_keys_that_differ_and_no_others(
    tmp_path: Path, old: dict[str, int], now: dict[str, int], advice: str
) -> None:
    """Its draws were independent and half of them were kept: the resumed capture takes both from its header."""
    begun = prepare(capture_config(tmp_path, teacher={**old, "draw_method": "iid", "kept_draws": 32}))
    document = capture_config(tmp_path, teacher=now).model_dump(exclude_unset=True)
    document["teacher"].pop("top_k", None)
    with pytest.raises(HeaderMismatch) as raised:
        prepare(CaptureConfig.model_validate(document))
    assert advice in raised.value.fix
    document["teacher"] |= old
    assert prepare(CaptureConfig.model_validate(document)).header == begun.header


def test_a_teacher_of_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = capture_config(tmp_path)
    commit = making.in_hub_cache(Path(config.teacher.model), tmp_path / "cache", "org/teacher", monkeypatch)
    facts = prepare(capture_config(tmp_path, output="other", teacher={"model": "org/teacher"})).header.teacher
    assert (facts.name, facts.revision, facts.weights_fingerprint) == ("org/teacher", commit, f"commit:{commit}")
