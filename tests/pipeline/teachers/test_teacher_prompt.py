"""Laws of the engines on rows that the teacher reads after another prompt, against transformers' own logits.

The reference renders each side by hand, and finds the answer's positions by the length of the prompt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.teachers.answer_sampling import answer_sequence
from coldstill.pipeline.teachers.protocol import (
    ScoredSequence,
    StoredRow,
    Teacher,
    TokenSequence,
    scored_of,
)
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.errors import InvalidRow
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import About
from coldstill.storage_schema.rows import TeacherTargets, span_positions
from tests import making, vision
from tests.pipeline.teachers import image_rows
from tests.pipeline.teachers.same_targets import TOLERANCE, assert_equal, assert_same
from tests.pipeline.teachers.serving import served

HERE = "tests.pipeline.teachers.test_teacher_prompt"
TOP_K, DRAWS, ROW, READ = 12, 10, 96, 300


class Pair(NamedTuple):
    """What the teacher reads, and the same answers after the row's own prompts."""

    read: TokenSequence
    own: TokenSequence


def _sequence(tokenizer: Any, name: str, turns: Sequence[tuple[str, str | None]]) -> TokenSequence:
    """Prompts and answers in turn; all tokens of an answer are targets."""
    ids: list[int] = []
    spans: list[list[int]] = []
    for question, answer in turns:
        ids += tokenizer(f"<s>user:{question}</s><s>assistant:", add_special_tokens=False)["input_ids"]
        if answer is not None:
            written = tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"]
            spans.append([len(ids) - 1, len(ids) - 1 + len(written)])
            ids += written
    return TokenSequence(
        sample_id=name,
        source_row=0,
        token_ids=np.array(ids, np.int32),
        target_spans=np.array(spans, np.int32).reshape(-1, 2),
        metadata={"n": 1},
    )


def _paired(read: TokenSequence, own: TokenSequence) -> Pair:
    return Pair(replace(read, stored=StoredRow(own.token_ids, own.target_spans, own.media)), own)


def _pairs(tokenizer: Any, *, answered: bool = True) -> list[Pair]:
    """One answer or several; the teacher's prompt is longer, much longer, or shorter."""
    turns: list[list[tuple[str, str, str | None]]] = [
        [("Say it loud. Hi", "Hi", "HELLO")],
        [("A long document. " * 14 + "?", "?", "Yes, it is one.")],
        [("", "A question that only the student reads", "No")],
        [("Be brief: one", "one", "1"), ("two", "two, please", "2"), ("three!" * 5, "three", "The third is 3")],
    ]
    pairs = []
    for number, row in enumerate(turns):
        row = row if answered else [(*row[0][:2], None)]
        theirs = _sequence(tokenizer, f"row {number}", [(long, answer) for long, _, answer in row])
        own = _sequence(tokenizer, f"row {number}", [(short, answer) for _, short, answer in row])
        pairs.append(_paired(theirs, own))
    return pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharper than a random model, so that prompts matter."""
    folder = making.chat_model(tmp_path_factory.mktemp("teacher"), seed=5, padding=0, context=READ + 1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data *= 20
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[Pair]:
    return _pairs(tokenizer)


def _header(folder: Path, **changes: Any) -> DatasetHeader:
    fields = {"draws": DRAWS, "kept_draws": DRAWS, "draw_logprobs": True, "draw_seed": 9, "max_length": ROW, **changes}
    header = making.tiny_header(folder, top_k=TOP_K, **fields)
    end = (AutoTokenizer.from_pretrained(folder).eos_token_id,)
    return header.model_copy(update={"about": About(max_read_length=READ, end_token_ids=end)})


def _load(folder: Path, engine: str, sampling: SamplingConfig | None = None, **changes: Any) -> Teacher:
    fields = {"model": str(folder), "engine": engine, "top_k": TOP_K, "min_prob": 0.0, "dtype": "float32"}
    lengths = {"max_length": ROW, "max_read_length": READ}
    drawing = {"draws": DRAWS, "kept_draws": DRAWS, "draw_logprobs": True, "draw_seed": 9}
    if engine == "vllm":
        changes["engine_args"] = {**making.SMALL_ENGINE, **changes.get("engine_args", {})}
    order = changes.pop("order", "exact")
    config = TeacherConfig.model_validate({**fields, **lengths, **drawing, **changes})
    own = {"draws": config.draws, "kept_draws": config.draws, "draw_logprobs": config.draw_logprobs}
    mode = {"mode": "generate", "sampling": sampling.model_dump(mode="json")} if sampling else {}
    header = _header(folder, **own, **mode, order=order, tail="exact" if config.can_draw else "derived")
    teacher = load_teacher(config, header, sampling)
    os.environ.pop("LD_PRELOAD", None)  # set by vLLM for its children; the other tests start children too
    return teacher


def _targets(teacher: Teacher, sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
    results = teacher.score(sequences)
    assert all(isinstance(result, ScoredSequence) for result in results), results
    return [one.targets for one in scored_of(results)]


@torch.inference_mode()
def _reference(folder: Path, sequence: TokenSequence) -> np.ndarray:
    """`float64 [N, V]`: log-probs of the whole sequence in one forward pass, at the positions before each label."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = model(torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0].double().log_softmax(-1)
    return dense[[t for start, stop in sequence.target_spans for t in range(start, stop)]].numpy()


def _assert_reference(folder: Path, pair: Pair, result: ScoredSequence) -> None:
    row = result.row
    np.testing.assert_array_equal(row.token_ids, pair.own.token_ids)
    np.testing.assert_array_equal(row.target_spans, pair.own.target_spans)
    assert row.metadata == {"n": 1, "teacher_tokens": pair.read.token_ids.size}
    wanted = _reference(folder, pair.read)
    positions = np.arange(len(wanted))
    labels = pair.own.token_ids[span_positions(pair.own.target_spans) + 1]
    np.testing.assert_allclose(row.targets.label_logprob, wanted[positions, labels], atol=TOLERANCE)
    best = -np.sort(-wanted, 1)[:, :TOP_K]
    ours = row.targets.by_probability()
    np.testing.assert_allclose(ours.logprobs, best, atol=TOLERANCE)
    np.testing.assert_allclose(np.take_along_axis(wanted, ours.ids, 1), ours.logprobs, atol=TOLERANCE)
    row.check(token_count=wanted.shape[1])
    assert np.abs(_reference(folder, pair.own) - wanted).max() > 0.1, "the prompts make no difference"


# transformers


@pytest.fixture(scope="module")
def by_transformers(folder: Path, pairs: list[Pair]) -> list[ScoredSequence]:
    return scored_of(_load(folder, "transformers").score([pair.read for pair in pairs]))


def test_targets_are_the_teachers_after_its_own_prompt_and_stand_at_the_rows_positions(
    folder: Path, pairs: list[Pair], by_transformers: list[ScoredSequence]
) -> None:
    for pair, result in zip(pairs, by_transformers, strict=True):
        _assert_reference(folder, pair, result)


def test_draws_depend_on_stored_positions_only(folder: Path, pairs: list[Pair]) -> None:
    """A row whose stored side equals what is read is drawn as an ordinary one, and a shifted one is not."""
    teacher = _load(folder, "transformers")
    plain = [replace(pair.read, stored=None) for pair in pairs]
    same = [replace(one, stored=one.as_stored) for one in plain]
    assert_equal(_targets(teacher, same), _targets(teacher, plain))
    shifted = _targets(teacher, [pair.read for pair in pairs])
    for one, other in zip(shifted, _targets(teacher, plain), strict=True):
        np.testing.assert_array_equal(one.label_logprob, other.label_logprob)
        assert not np.array_equal(one.draw_ids, other.draw_ids)


SAMPLING = SamplingConfig(n=2, max_tokens=40, temperature=0.8, seed=4)


def _assert_answers(folder: Path, prompts: list[Pair], results: Sequence[Any]) -> None:
    """Each answer is to the teacher's prompt, and is stored after the row's, within both bounds."""
    scored = scored_of(results)
    assert len(scored) == len(prompts) * SAMPLING.n
    for number, result in enumerate(scored):
        pair, row = prompts[number // SAMPLING.n], result.row
        first, own = pair.read.token_ids.size, pair.own.token_ids.size
        answer = result.sequence.token_ids[first:]
        assert row.sample_id == f"{pair.own.sample_id}#{number % SAMPLING.n}"
        np.testing.assert_array_equal(row.token_ids, [*pair.own.token_ids, *answer])
        assert row.target_spans.tolist() == [[own - 1, own - 1 + answer.size]]
        assert row.metadata["teacher_tokens"] == first + answer.size
        room = min(SAMPLING.max_tokens, ROW - own, READ - first)
        assert (row.metadata["finish_reason"] == "length") == (answer.size == room and answer[-1] != 1)
        whole = replace(pair.read, token_ids=result.sequence.token_ids, target_spans=result.sequence.target_spans)
        wanted = _reference(folder, whole)[np.arange(answer.size), answer]
        np.testing.assert_allclose(row.targets.label_logprob, wanted, atol=TOLERANCE)


def _prompts(tokenizer: Any) -> list[Pair]:
    """Of the last two, one leaves room for 7 tokens in the row, and one for 5 in what the teacher reads."""
    room = _sequence(tokenizer, "own room", [("x" * (ROW - 7 - 18), None)])
    assert room.token_ids.size == ROW - 7
    long = _sequence(tokenizer, "read room", [("y" * (READ - 5 - 18), None)])
    short = _sequence(tokenizer, "read room", [("y", None)])
    tight = [_paired(_sequence(tokenizer, "own room", [("x", None)]), room), _paired(long, short)]
    return [*_pairs(tokenizer, answered=False), *tight]


def test_answers_are_to_the_teachers_prompt_and_are_stored_after_the_rows(folder: Path, tokenizer: Any) -> None:
    prompts = _prompts(tokenizer)
    results = _load(folder, "transformers", SAMPLING).score([pair.read for pair in prompts])
    _assert_answers(folder, prompts, results)
    assert {one.row.token_ids.size for one in scored_of(results)[-4:-2]} <= {*range(ROW - 6, ROW + 1)}


def test_a_prompt_that_leaves_no_room_on_one_side_is_named(folder: Path, tokenizer: Any) -> None:
    teacher = _load(folder, "transformers", SAMPLING)
    full = _paired(_sequence(tokenizer, "r", [("y" * (READ - 18), None)]), _sequence(tokenizer, "r", [("y", None)]))
    with pytest.raises(InvalidRow, match="max_read_length leaves room"):
        teacher.score([full.read])


# A class of the user's own, and a server


class OwnTeacher(Teacher):
    """Uniform; returns new sequences that hold nothing of the stored row."""

    def __init__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None):
        self._header, self._sampling = header, sampling
        self._tokens = int(config.engine_args.get("tokens", 2))

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoredSequence]:
        if self._sampling is not None:
            tokens = [3] * self._tokens
            sequences = [answer_sequence(one, tokens, number=0, answers=1, finish_reason="stop") for one in sequences]
        return [self._uniform(replace(one, stored=None)) for one in sequences]

    def _uniform(self, sequence: TokenSequence) -> ScoredSequence:
        targets = TeacherTargets.empty(span_positions(sequence.target_spans).size, TOP_K)
        targets.ids[:] = np.arange(TOP_K)
        targets.logprobs[:] = targets.label_logprob[:] = -np.log(self._header.token_count)
        targets.counts[:] = TOP_K
        targets.log_tail[:] = np.log1p(-TOP_K / self._header.token_count)
        return ScoredSequence(sequence, targets)


def test_a_class_of_the_users_own_need_not_look_at_the_stored_row(
    folder: Path, tokenizer: Any, pairs: list[Pair]
) -> None:
    own = {"draws": 0, "draw_logprobs": False}
    teacher = _load(folder, f"{HERE}:OwnTeacher", **own)
    for pair, result in zip(pairs, scored_of(teacher.score([pair.read for pair in pairs])), strict=True):
        np.testing.assert_array_equal(result.row.token_ids, pair.own.token_ids)
        assert result.row.metadata["teacher_tokens"] == pair.read.token_ids.size
    sampling = SamplingConfig(max_tokens=2)
    answering = _load(folder, f"{HERE}:OwnTeacher", sampling, **own)
    prompts = _pairs(tokenizer, answered=False)
    for pair, result in zip(prompts, scored_of(answering.score([pair.read for pair in prompts])), strict=True):
        np.testing.assert_array_equal(result.row.token_ids, [*pair.own.token_ids, 3, 3])
    rambling = _load(folder, f"{HERE}:OwnTeacher", sampling, engine_args={"tokens": ROW}, **own)
    with pytest.raises(TeacherOutputInvalid, match="in the stored row"):
        rambling.score([prompts[0].read])


def test_a_server_reads_the_teachers_prompt(
    folder: Path, tokenizer: Any, pairs: list[Pair], by_transformers: list[ScoredSequence]
) -> None:
    with served(folder) as server:
        settings = {"endpoint": server.url, "draws": 0, "draw_logprobs": False}
        results = scored_of(_load(folder, "endpoint", **settings).score([pair.read for pair in pairs]))
        for result, reference in zip(results, by_transformers, strict=True):
            np.testing.assert_array_equal(result.row.token_ids, reference.row.token_ids)
            np.testing.assert_allclose(result.targets.label_logprob, reference.targets.label_logprob, atol=1e-4)
        prompts = _prompts(tokenizer)
        answers = _load(folder, "endpoint", SAMPLING, **settings).score([pair.read for pair in prompts])
    for number, answer in enumerate(scored_of(answers)):
        pair = prompts[number // SAMPLING.n]
        np.testing.assert_array_equal(answer.row.token_ids[: pair.own.token_ids.size], pair.own.token_ids)
        assert answer.row.token_ids.size <= ROW


# Images


def test_images_of_a_row_are_expanded_in_what_the_teacher_reads(tmp_path: Path) -> None:
    folder = vision.idefics3_model(tmp_path / "tiles", splits=True, seed=5)
    own = image_rows.rows(folder)
    tokenizer = image_rows.AutoProcessor.from_pretrained(folder).tokenizer
    read = []
    for number, (row, (question, answer, _)) in enumerate(zip(own, image_rows.ROWS, strict=True)):
        data = [medium.data or b"" for medium in row.media]
        theirs = image_rows.row(tokenizer, number, f"Be brief. {question} Now:", answer, data)
        read.append(replace(theirs, stored=StoredRow(row.token_ids, row.target_spans, row.media)))
    teacher = load_teacher(image_rows.config(folder, "transformers"), image_rows.header(folder))
    reference = image_rows.Reference(folder)
    for row, result in zip(own, scored_of(teacher.score(read)), strict=True):
        assert result.row.media == row.media
        np.testing.assert_array_equal(result.row.token_ids, row.token_ids)
        wanted = reference.logprobs(result.sequence)
        labels = row.token_ids[span_positions(row.target_spans) + 1]
        np.testing.assert_allclose(
            result.row.targets.label_logprob, wanted[np.arange(labels.size), labels], atol=TOLERANCE
        )


# Real vLLM


@pytest.fixture(scope="module")
def tap(folder: Path) -> Any:
    pytest.importorskip("vllm")
    return _load(folder, "vllm")


def test_the_tap_gives_what_transformers_gives(
    tap: Any, folder: Path, pairs: list[Pair], by_transformers: list[ScoredSequence]
) -> None:
    results = scored_of(tap.score([pair.read for pair in pairs]))
    for pair, result in zip(pairs, results, strict=True):
        _assert_reference(folder, pair, result)
    assert_same([one.targets for one in results], [one.targets for one in by_transformers])
    plain = [replace(pair.read, stored=None) for pair in pairs]
    assert_equal(_targets(tap, [replace(one, stored=one.as_stored) for one in plain]), _targets(tap, plain))


@pytest.mark.slow
def test_the_public_path_gives_the_same(folder: Path, pairs: list[Pair]) -> None:
    pytest.importorskip("vllm")
    public = _load(folder, "vllm", tap="public", draws=0, draw_logprobs=False)
    for pair, result in zip(pairs, scored_of(public.score([pair.read for pair in pairs])), strict=True):
        _assert_reference(folder, pair, result)


@pytest.mark.slow
def test_chunks_and_cached_prefixes_leave_no_position_out(
    tap: Any, folder: Path, tokenizer: Any, pairs: list[Pair]
) -> None:
    """Chunks of 48 tokens end inside of prompts and answers; equal prompts of the teacher are in the cache."""
    system = "A system prompt that all rows have. " * 5
    shared = [
        _paired(
            _sequence(tokenizer, f"shared {number}", [(f"{system}{number}", "Its answer" * number)]),
            _sequence(tokenizer, f"shared {number}", [(f"{number}", "Its answer" * number)]),
        )
        for number in range(1, 7)
    ]
    read = [pair.read for pair in [*pairs, *shared]]
    arguments = {"max_num_batched_tokens": 48, "max_num_seqs": 8, "enable_prefix_caching": True}
    teacher = _load(folder, "vllm", order="fast", engine_args=arguments)
    wanted = _targets(tap, read)
    assert_same(_targets(teacher, read), wanted)
    assert_same(_targets(teacher, read), wanted)


@pytest.mark.slow
def test_answers_under_vllm_are_whole_after_preemption(folder: Path, tokenizer: Any) -> None:
    """Little room for keys and values: while answers grow, requests are preempted and computed again."""
    pytest.importorskip("vllm")
    arguments = {"block_size": 32, "num_gpu_blocks_override": 14, "max_num_seqs": 8, "disable_log_stats": False}
    teacher: Any = _load(folder, "vllm", SAMPLING, engine_args=arguments)
    prompts = _prompts(tokenizer)
    results = teacher.score([pair.read for pair in prompts])
    counters = {metric.name: metric for metric in teacher._engine._llm.get_metrics()}
    assert counters["vllm:num_preemptions"].value > 0, "nothing was preempted: the test proves nothing"
    _assert_answers(folder, prompts, results)
