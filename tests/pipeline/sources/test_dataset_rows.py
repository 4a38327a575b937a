"""Rows of a sealed dataset, scored again: the same ids, tokens, spans and units, with another teacher's targets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from coldstill.common.config_file import ConfigInvalid, check_config
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.dry_run import dry_run
from coldstill.pipeline.errors import SourceEmpty, WriterRoundUnused
from coldstill.pipeline.prepare import prepare
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import DatasetNotSealed, HeaderMismatch, ShardTooLarge, TokenizerMismatch
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.tools.verify import verify
from tests import making
from tests.pipeline.capturing import capture_config, do_units


def _sealed(config: CaptureConfig) -> Dataset:
    store = prepare(config).store
    do_units(config)
    seal(store)
    return open_dataset(store.url)


def _again(folder: Path, of: str = "dataset", output: str = "again", **changes: object) -> CaptureConfig:
    """A capture that scores the rows of the dataset `of`."""
    source = {"path": None, "rows_of": str(folder / of), **changes.pop("source", {})}  # type: ignore[dict-item]
    return capture_config(folder, output=output, source=source, **changes)


def _same_rows(found: Dataset, wanted: Dataset, *, targets: bool) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found.rows(), wanted.rows(), strict=True):
        assert (one.sample_id, one.metadata) == (other.sample_id, other.metadata)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.target_spans, other.target_spans)
        if targets:
            for field in dataclasses.fields(one.targets):
                np.testing.assert_array_equal(
                    getattr(one.targets, field.name), getattr(other.targets, field.name), err_msg=field.name
                )


def test_the_same_teacher_gives_the_same_targets_and_another_one_what_it_gives_from_the_text(tmp_path: Path) -> None:
    first = _sealed(capture_config(tmp_path))
    again = _sealed(_again(tmp_path))
    _same_rows(again, first, targets=True)
    assert [shard.rows for shard in again.shards] == [shard.rows for shard in first.shards if shard.rows]
    assert again.header.source_sha256 == first.dataset_id
    assert again.header.about.writer is None
    for name in ("chat_template_sha256", "loss_on", "mode", "max_length"):
        assert getattr(again.header, name) == getattr(first.header, name)
    making.chat_model(tmp_path / "other", seed=5)
    other = {"teacher": {"model": str(tmp_path / "other")}}
    rescored = _sealed(_again(tmp_path, output="rescored", **other))
    _same_rows(rescored, _sealed(capture_config(tmp_path, output="from text", **other)), targets=True)
    assert rescored.header.teacher.weights_fingerprint != first.header.teacher.weights_fingerprint
    assert verify(rescored.store.url, deep=True) == []


def test_answers_are_scored_as_they_were_written_and_the_header_names_who_wrote_them(tmp_path: Path) -> None:
    sampling = {"n": 2, "max_tokens": 6, "seed": 3}
    answers = _sealed(capture_config(tmp_path, rows=12, output="answers", mode="generate", sampling=sampling))
    making.chat_model(tmp_path / "other", seed=5)
    config = _again(tmp_path, "answers", source={"round": 4}, teacher={"model": str(tmp_path / "other")})
    scores = _sealed(config)
    _same_rows(scores, answers, targets=False)
    writer = scores.header.about.writer
    assert writer is not None
    assert (writer.name, writer.round) == ("teacher", 4)
    assert writer.weights_fingerprint == answers.header.teacher.weights_fingerprint
    assert (scores.header.mode, scores.header.loss_on) == ("score", "last_turn")
    # Scored a third time, they still have the writer that they had.
    third = _sealed(_again(tmp_path, "again", output="third"))
    assert third.header.about.writer == writer
    for root, number, problem in (("again", 3, "teacher wrote .* in round 4"), ("third", 5, "in round 4")):
        with pytest.raises(WriterRoundUnused, match=problem):
            prepare(_again(tmp_path, root, output="fourth", source={"round": number}))
    assert not (tmp_path / "fourth").exists()
    # The writer itself agrees with the log-probs that it wrote down.
    for one, other in zip(third.rows(), answers.rows(), strict=True):
        np.testing.assert_allclose(one.targets.label_logprob, other.targets.label_logprob, atol=5e-3)


def test_a_row_that_is_too_long_for_this_teacher_is_rejected(tmp_path: Path) -> None:
    first = _sealed(capture_config(tmp_path, rows=20))
    lengths = [row.token_ids.size for row in first.rows()]
    bound = int(np.median(lengths))
    again = _sealed(_again(tmp_path, teacher={"max_length": bound}))
    assert len(again) == sum(length <= bound for length in lengths) < len(first)
    assert again.manifest.rejected == sum(length > bound for length in lengths)
    listed = b"".join(again.store.read(file.name) for file in again.manifest.files if "rejects/" in file.name)
    assert listed.count(b"over_long") == again.manifest.rejected


def test_a_start_over_the_same_rows_resumes_and_over_other_rows_is_refused(tmp_path: Path) -> None:
    _sealed(capture_config(tmp_path))
    _sealed(capture_config(tmp_path, output="fewer", calibration_targets=0, teacher={"top_k": 3}))
    config = _again(tmp_path)
    prepared = prepare(config)
    assert prepare(config).units == prepared.units
    (tmp_path / "dataset").rename(tmp_path / "moved")
    assert prepare(_again(tmp_path, "moved")).header == prepared.header
    with pytest.raises(HeaderMismatch, match="source_sha256"):
        prepare(_again(tmp_path, "fewer"))
    do_units(_again(tmp_path, "moved"))
    assert seal(prepared.store).rows == 40


def test_a_teacher_with_another_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    _sealed(capture_config(tmp_path, rows=4))
    making.tiny_llama(tmp_path / "other")
    for run in (prepare, dry_run):
        with pytest.raises(TokenizerMismatch, match="rows_of"):
            run(_again(tmp_path, teacher={"model": str(tmp_path / "other")}))
    assert not (tmp_path / "again" / "dataset.json").exists()


def test_rows_of_a_dataset_that_is_not_finished_are_refused(tmp_path: Path) -> None:
    first = _sealed(capture_config(tmp_path, rows=4))
    (Path(first.store.url) / MANIFEST_NAME).unlink()
    with pytest.raises(DatasetNotSealed):
        prepare(_again(tmp_path))


def test_a_dry_run_counts_the_rows_of_the_dataset(tmp_path: Path) -> None:
    first = _sealed(capture_config(tmp_path, rows=20))
    found = dry_run(_again(tmp_path), progress=False)
    assert (found.rows, found.tokens, found.targets) == (20, first.manifest.tokens, first.manifest.targets)


def test_a_dataset_without_rows_is_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    making.write_dataset(
        tmp_path / "none", [[]], header=making.tiny_header(tokenizer_folder), tokenizer=tokenizer_folder
    )
    from coldstill.pipeline.sources.dataset_rows import DatasetRows

    with pytest.raises(SourceEmpty, match="no rows"):
        DatasetRows(str(tmp_path / "none")).survey(10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"rows_of": "d", "path": "x.jsonl"}}, "or rows_of instead"),
        ({"source": {"rows_of": "d", "loss_on": "all"}}, "no source.loss_on with rows_of"),
        ({"source": {"rows_of": "d", "over_long": "cut"}}, "no source.over_long with rows_of"),
        ({"source": {"path": "x.jsonl", "round": 1}}, "source.round 0 without rows_of"),
        ({"source": {"rows_of": "d"}, "mode": "generate"}, "mode score with source.rows_of"),
    ],
)
def test_settings_without_effect_on_stored_rows_are_refused(changes: dict[str, object], message: str) -> None:
    document = {"output": "o", "teacher": {"model": "m"}, **changes}
    with pytest.raises(ConfigInvalid, match=message):
        check_config(document, model=CaptureConfig, where="x.yaml")


def test_rows_written_under_another_prompt_keep_that_fact_and_not_the_length_of_that_prompt(tmp_path: Path) -> None:
    """The teacher that scores them reads the row itself, so `teacher_tokens` would not be true of it."""
    prompt = {"source": {"teacher_system": "Answer in a sentence."}, "sampling": {"max_tokens": 6}}
    answers = _sealed(capture_config(tmp_path, rows=6, output="answers", mode="generate", **prompt))
    assert all("teacher_tokens" in row.metadata for row in answers.rows())
    scores = _sealed(_again(tmp_path, "answers", output="scores"))
    header = scores.header
    assert (header.teacher_prompt, header.about.writer_prompt) == (None, answers.header.teacher_prompt)
    for one, other in zip(scores.rows(), answers.rows(), strict=True):
        assert one.metadata == {name: value for name, value in other.metadata.items() if name != "teacher_tokens"}
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    assert (
        _sealed(_again(tmp_path, "scores", output="third")).header.about.writer_prompt == answers.header.teacher_prompt
    )
    own = _sealed(capture_config(tmp_path, rows=6, output="own", mode="generate", sampling={"max_tokens": 6}))
    own = _sealed(_again(tmp_path, "own", output="own scores"))
    assert own.header.about.writer_prompt is None


def test_a_shard_that_is_too_large_is_foreseen_and_the_advice_fits_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _sealed(capture_config(tmp_path, rows=20))
    fixes = {}
    for config in (capture_config(tmp_path, rows=20, output="large"), _again(tmp_path)):
        with monkeypatch.context() as small:
            for module in ("pipeline.dry_run", "storage_schema.shard.writer"):
                small.setattr(f"coldstill.{module}.MAX_SHARD_BYTES", 2_000)
            caplog.clear()
            dry_run(config, progress=False)
            prepare(config)
            with pytest.raises(ShardTooLarge) as raised:
                do_units(config)
        fixes[config.output] = raised.value.fix
        assert raised.value.fix in caplog.text
    of_text, of_rows = fixes.values()
    assert "lower rows_per_unit" in of_text
    assert "rows_per_unit has no effect" in of_rows
    assert "teacher.top_k" in of_rows
    caplog.clear()
    dry_run(config, progress=False)
    assert not caplog.records
