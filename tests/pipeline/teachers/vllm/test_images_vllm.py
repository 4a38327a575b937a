"""Laws of the vLLM engine on rows with images: real vLLM, by its tap and by its public path, against transformers."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldstill.pipeline.config import SamplingConfig
from coldstill.pipeline.errors import TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.image_expansion import Expansion
from coldstill.pipeline.teachers.protocol import (
    ScoredSequence,
    Teacher,
    TokenSequence,
    UnscoredSequence,
    scored_of,
)
from coldstill.pipeline.teachers.transformers_teacher import TransformersTeacher
from coldstill.pipeline.teachers.vllm import prompts as prompts_module
from coldstill.pipeline.teachers.vllm.self_check import check_agreement, self_check_sequences
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.rows import TeacherTargets
from tests import vision
from tests.pipeline.teachers.image_rows import CONTEXT, config, header, medium, row, rows
from tests.pipeline.teachers.same_targets import TOLERANCE, assert_equal, assert_same

pytest.importorskip("vllm")


def _load(folder: Path, sampling: SamplingConfig | None = None, changes: dict[str, Any] | None = None, **teacher: Any):  # type: ignore[no-untyped-def]
    made = header(folder, **(changes or {}))
    loaded = load_teacher(config(folder, "vllm", **teacher), made, sampling)
    os.environ.pop("LD_PRELOAD", None)  # set by vLLM for its children; the other tests start children too
    return loaded


def _targets(teacher: Teacher, sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
    results = teacher.score(sequences)
    assert all(isinstance(result, ScoredSequence) for result in results), results
    return [one.targets for one in scored_of(results)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.idefics3_model(tmp_path_factory.mktemp("teacher") / "tiles", splits=True, seed=5)


@pytest.fixture(scope="module")
def sequences(folder: Path) -> list[TokenSequence]:
    return [*rows(folder), *rows(folder, loss="all")]


@pytest.fixture(scope="module")
def by_transformers(folder: Path, sequences: list[TokenSequence]) -> list[TeacherTargets]:
    """Equal to the slow reference, by the laws of that engine."""
    return _targets(TransformersTeacher(config(folder, "transformers"), header(folder)), sequences)


@pytest.fixture(scope="module")
def tap(folder: Path) -> Any:
    return _load(folder)


@pytest.fixture(scope="module")
def by_tap(tap: Any, sequences: list[TokenSequence]) -> list[TeacherTargets]:
    return _targets(tap, sequences)


def test_the_tap_gives_what_transformers_gives_for_1_2_and_3_images(
    by_tap: list[TeacherTargets], by_transformers: list[TeacherTargets], folder: Path
) -> None:
    assert_same(by_tap, by_transformers)
    for targets in by_tap:
        targets.check(token_count=header(folder).token_count)


def test_the_same_call_gives_the_same_bits(
    tap: Any, sequences: list[TokenSequence], by_tap: list[TeacherTargets]
) -> None:
    assert_equal(_targets(tap, sequences), by_tap)
    _targets(tap, sequences[::-2])  # what the engine has seen before changes nothing
    assert_equal(_targets(tap, sequences), by_tap)


def test_values_do_not_depend_on_the_order_of_rows(
    tap: Any, sequences: list[TokenSequence], by_tap: list[TeacherTargets]
) -> None:
    assert_same(_targets(tap, sequences[::-1])[::-1], by_tap)


def test_batches_of_bounded_memory_change_no_value(
    tap: Any, sequences: list[TokenSequence], by_tap: list[TeacherTargets], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = tap._tapped
    monkeypatch.setattr(tap, "_tapped", lambda prompts: sizes.append(len(prompts)) or original(prompts))
    monkeypatch.setattr(prompts_module, "_BATCH_BYTES", 3 * 5 * 3 * 32 * 32 * 4)  # of three images in 2 x 2 tiles
    first = _targets(tap, sequences)
    assert_same(first, by_tap)
    assert sum(sizes) == len(sequences)
    assert len(sizes) > 3
    assert max(sizes) < 6
    before = list(sizes)
    assert_equal(_targets(tap, sequences), first)  # their borders are those of the rows
    assert sizes == before * 2


def test_a_swapped_image_gives_other_targets(tap: Any, sequences: list[TokenSequence]) -> None:
    sequence = sequences[2]
    first, second = sequence.media
    crossed = (replace(second, position=first.position), replace(first, position=second.position))
    # Of one size, so that the token ids cannot tell them apart.
    same = [replace(m, data=vision.image_bytes(n, size=(64, 48))) for n, m in enumerate(sequence.media)]
    alike = replace(sequence, media=tuple(same))
    turned = replace(
        sequence, media=(replace(same[1], position=first.position), replace(same[0], position=second.position))
    )
    one, other, third, fourth = _targets(tap, [sequence, replace(sequence, media=crossed), alike, turned])
    assert np.abs(one.label_logprob - other.label_logprob).max() > 100 * TOLERANCE
    assert np.abs(third.label_logprob - fourth.label_logprob).max() > 100 * TOLERANCE


def test_faults_of_a_row_are_named_and_the_others_are_scored(
    tap: Any, folder: Path, sequences: list[TokenSequence], by_tap: list[TeacherTargets]
) -> None:
    good, data = sequences[2], vision.image_bytes(0)
    placeholder = int(good.token_ids[good.media[0].position])
    many = row(_tokenizer(folder), 7, "<image>" * 9, "x", [data] * 9)
    long = row(_tokenizer(folder), 8, "<image>" * 8 + "a" * 300, "x", [vision.image_bytes(1, size=(60, 60))] * 8)
    differs = RejectReason.PLACEHOLDERS_DIFFER
    faults = [
        (differs, replace(good, media=good.media[:1])),
        (differs, replace(good, media=(*good.media, medium(good.token_ids.size - 2, data)))),
        (differs, replace(good, media=tuple(replace(m, position=m.position + 1) for m in good.media))),
        (differs, replace(sequences[1], token_ids=np.append(sequences[1].token_ids, np.int32(placeholder)))),
        (RejectReason.IMAGE_UNREADABLE, replace(good, media=(medium(good.media[0].position, b"GIF"), good.media[1]))),
        (RejectReason.TOO_MANY_IMAGES, many),
        (RejectReason.OVER_LONG, long),
    ]
    results = tap.score([good, *(fault for _, fault in faults), sequences[1]])
    for (reason, sequence), result in zip(faults, results[1:-1], strict=True):
        assert isinstance(result, UnscoredSequence)
        assert (result.sample_id, result.reason) == (sequence.sample_id, reason), result
    assert_same([one.targets for one in scored_of(results)], [by_tap[2], by_tap[1]])
    assert f"at most {CONTEXT}" in results[-2].detail
    assert tap._engine.call_workers("coldstill_drop", []) == [0]


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder).tokenizer


@pytest.mark.parametrize("fault", ["one image less", "an image in another place", "other text", "no ranges"])
def test_an_engine_that_expands_otherwise_is_found_row_by_row(
    tap: Any, sequences: list[TokenSequence], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Faults that vLLM does not report: fewer images than placeholders, a merged or a shifted token."""
    original = tap._engine.render

    def render(prompt: dict[str, Any]) -> Any:
        if fault == "one image less":
            prompt = {**prompt, "multi_modal_data": {"image": prompt["multi_modal_data"]["image"][1:]}}
            if not prompt["multi_modal_data"]["image"]:
                return {"prompt_token_ids": prompt["prompt_token_ids"]}
        made = dict(original(prompt))
        if fault == "other text":
            made["prompt_token_ids"] = [*made["prompt_token_ids"][:-1], 5]
        elif fault == "an image in another place":
            ranges = made["mm_placeholders"]["image"]
            made["mm_placeholders"] = {"image": [replace(each, offset=each.offset + 1) for each in ranges]}
        elif fault == "no ranges":
            made["mm_placeholders"] = {}
        return made

    monkeypatch.setattr(tap._prompts, "_render", render)
    for result, sequence in zip(tap.score(sequences), sequences, strict=True):
        if sequence.media:
            assert isinstance(result, UnscoredSequence)
            assert result.reason is RejectReason.PLACEHOLDERS_DIFFER
        else:
            assert isinstance(result, ScoredSequence)


def test_overlapping_calls_give_what_calls_alone_give(
    tap: Any, sequences: list[TokenSequence], by_tap: list[TeacherTargets]
) -> None:
    results: dict[int, list[TeacherTargets]] = {}

    def score(part: int) -> None:
        results[part] = _targets(tap, sequences[part::3])

    threads = [threading.Thread(target=score, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in range(3):
        assert_same(results[part], by_tap[part::3])


def test_the_self_check_has_a_row_with_an_image(tap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens hold none that stands for an image, and positions that are off by one are found."""
    for seed in range(5):
        *texts, last = self_check_sequences(tap._header, seed=seed, images=tap._images)
        assert len(last.media) == 1
        assert not any(np.isin(one.token_ids, list(tap._images.reserved)).any() for one in texts)
    original = Expansion.spans

    def shifted(self: Expansion, stored: np.ndarray) -> list[list[int]]:
        *others, (start, stop) = original(self, stored)
        return [*others, [start - 1, stop - 1] if self.images.size else [start, stop]]

    monkeypatch.setattr(Expansion, "spans", shifted)
    with pytest.raises(TeacherOutputInvalid, match="other tokens than it was given"):
        check_agreement(tap._by_tap, tap._by_public_path, tap._header, tap._arithmetic, images=tap._images)
    assert tap._engine.call_workers("coldstill_drop", []) == [0]


@pytest.mark.slow
def test_images_without_tiles_give_what_transformers_gives(tmp_path: Path) -> None:
    folder = vision.idefics3_model(tmp_path / "whole", seed=6)
    sequences = rows(folder, loss="all")
    reference = _targets(TransformersTeacher(config(folder, "transformers"), header(folder)), sequences)
    teacher = _load(folder)
    before = teacher.progress
    assert_same(_targets(teacher, sequences), reference)
    assert teacher.progress >= before + 4 + 1  # rows with images are made ready, and a step is made


@pytest.mark.slow
def test_the_public_path_gives_the_same(
    folder: Path, sequences: list[TokenSequence], by_transformers: list[TeacherTargets]
) -> None:
    none = {"draws": 0, "kept_draws": 0, "draw_logprobs": False}
    teacher = _load(folder, changes={**none, "tail": "derived"}, tap="public", **none)
    for ours, reference in zip(_targets(teacher, sequences), by_transformers, strict=True):
        ours, reference = ours.by_probability(), reference.by_probability()
        np.testing.assert_allclose(ours.logprobs, reference.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(ours.label_logprob, reference.label_logprob, atol=TOLERANCE)


@pytest.mark.slow
def test_chunks_across_an_image_and_cached_prefixes_leave_no_position_out(
    folder: Path, sequences: list[TokenSequence], by_tap: list[TeacherTargets]
) -> None:
    """Prompts come one by one in pieces of 48 tokens, which cut some images; each row is asked for twice."""
    arguments = {"max_num_batched_tokens": 48, "max_num_seqs": 1, "enable_prefix_caching": True}
    teacher = _load(folder, changes={"order": "fast"}, engine_args=arguments)
    assert teacher.environment["batched_tokens"] == 48
    (made,) = teacher._prompts.batches(sequences, is_answered=False)
    starts = [prompt.expansion.positions(prompt.expansion.images) - prompt.expansion.lengths + 1 for prompt in made]
    assert (
        sum(
            int((start // 48 < (start + prompt.expansion.lengths - 1) // 48).sum())
            for start, prompt in zip(starts, made, strict=True)
        )
        > 2
    ), "no piece ends inside an image: the test proves nothing"
    assert_same(_targets(teacher, sequences), by_tap)
    assert_same(_targets(teacher, sequences), by_tap)


@pytest.mark.slow
def test_answers_to_images_are_whole_after_preemption_and_equal_a_later_score(folder: Path, tap: Any) -> None:
    """Little room for keys and values: while answers grow, requests are preempted and computed again."""
    arguments = {"block_size": 32, "num_gpu_blocks_override": 24, "max_num_seqs": 16, "disable_log_stats": False}
    sampling = SamplingConfig(n=2, seed=4, max_tokens=100, temperature=0.6)
    generating = _load(folder, sampling, changes={"mode": "generate"}, engine_args=arguments)
    prompts = rows(folder, prompts=True)
    results = generating.score(prompts)
    names = [one.sample_id if isinstance(one, UnscoredSequence) else one.sequence.sample_id for one in results]
    assert names == [f"{prompt.sample_id}#{number}" for prompt in prompts for number in range(2)]
    unscored = [one for one in results if isinstance(one, UnscoredSequence)]
    assert {one.detail for one in unscored} <= {"an answer that holds a token of images"}
    answers = scored_of(results)
    assert {len(answer.sequence.media) for answer in answers} >= {0, 1}
    assert len(answers) > 2
    assert_same([answer.targets for answer in answers], _targets(tap, [answer.sequence for answer in answers]))
    counters = {metric.name: metric for metric in generating._engine._llm.get_metrics()}
    assert counters["vllm:num_preemptions"].value > 0, "nothing was preempted: the test proves nothing"
    again = generating.score(prompts)
    for one, other in zip(results, again, strict=True):
        if isinstance(one, ScoredSequence):
            assert isinstance(other, ScoredSequence)
            assert one.sequence.token_ids.tolist() == other.sequence.token_ids.tolist()
            assert one.sequence.media == other.sequence.media
        else:
            assert one == other
    full = replace(prompts[0], token_ids=np.append(prompts[0].token_ids, np.full(CONTEXT - 60, 5, np.int32)))
    (first, second) = generating.score([full])
    assert isinstance(first, UnscoredSequence)
    assert (first.reason, first.sample_id) == (RejectReason.NO_ROOM, "row 0#0")
    assert second == first._replace(sample_id="row 0#1")
    assert generating._engine.call_workers("coldstill_drop", []) == [0]


@pytest.mark.slow
def test_a_stop_text_ends_an_answer_to_an_image(folder: Path) -> None:
    """vLLM then has the tokenizer from another folder than the processor."""
    sampling = SamplingConfig(max_tokens=60, stop=("a", "e", "o", "t"), seed=1)
    results = _load(folder, sampling, changes={"mode": "generate"}).score(rows(folder, prompts=True))
    answers = [one.sequence for one in scored_of(results) if one.sequence.metadata["finish_reason"] == "stop"]
    assert any(answer.media for answer in answers)
    tokenizer = _tokenizer(folder)
    for answer, prompt in ((a, rows(folder, prompts=True)[a.source_row]) for a in answers):
        said = [tokenizer.decode([token]) for token in answer.token_ids[prompt.token_ids.size :]]
        stops = [any(letter in text for letter in sampling.stop) for text in said]  # special tokens are text too
        assert stops[-1]
        assert not any(stops[:-1])


@pytest.mark.slow
def test_a_bfloat16_teacher_has_a_float32_head(folder: Path, sequences: list[TokenSequence]) -> None:
    facts = header(folder).teacher.model_copy(update={"dtype": "bfloat16", "head_dtype": "float32"})
    teacher = _load(folder, changes={"teacher": facts}, dtype="bfloat16")
    distinct = [len(set(entries)) for one in _targets(teacher, sequences) for entries in one.logprobs.tolist()]
    assert np.mean(distinct) > 15.9


@pytest.mark.parametrize(
    "name",
    ["limit_mm_per_prompt", "mm_processor_kwargs", "media_io_kwargs", "mm_processor_cache_gb", "language_model_only"],
)
def test_arguments_that_change_what_is_shown_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(TeacherUnusable, match=name):
        load_teacher(config(folder, "vllm", engine_args={name: 1}), header(folder))


def test_runner_v2_is_refused(folder: Path) -> None:
    with pytest.raises(TeacherUnusable, match="wanted: runner v1"):
        load_teacher(config(folder, "vllm", runner="v2"), header(folder))
