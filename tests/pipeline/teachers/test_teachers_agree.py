"""The engines on the same rows: real vLLM, by its tap and by its public path, against real transformers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.checkpoint import load_tokenizer
from coldstill.pipeline.teachers.protocol import ScoredSequence, Teacher, TokenSequence, non_finite
from coldstill.pipeline.teachers.vllm import teacher as teacher_module
from coldstill.pipeline.teachers.vllm.scoring import StepScorer
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import About
from coldstill.storage_schema.rows import TeacherTargets
from tests import making

TOLERANCE = 1e-5  # in log-prob; both engines compute in float32, and the notes measured 4.8e-6
TOP_K, DRAWS = 16, 12
CONTEXT = 300  # of the model, and the longest row: vLLM's one sampled token then lies beyond the context


def _config(folder: Path, engine: str = "vllm", **changes: object) -> TeacherConfig:
    fields = {"model": str(folder), "engine": engine, "top_k": TOP_K, "min_prob": 0.0, "max_length": CONTEXT}
    if engine == "vllm":
        changes["engine_args"] = {**making.SMALL_ENGINE, **changes.get("engine_args", {})}  # type: ignore[dict-item]
    return TeacherConfig.model_validate({**fields, "dtype": "float32", **changes})


def _load(config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None) -> Any:
    teacher = load_teacher(config, header, sampling)
    os.environ.pop("LD_PRELOAD", None)  # set by vLLM for its children; the other tests start children too
    return teacher


def _targets(teacher: Teacher, sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
    scored = teacher.score(sequences)
    assert all(one.sequence is sequence for one, sequence in zip(scored, sequences, strict=True))
    return [one.targets for one in scored]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.chat_model(tmp_path_factory.mktemp("teacher"), seed=5, padding=6, context=CONTEXT)


@pytest.fixture(scope="module")
def header(folder: Path) -> DatasetHeader:
    changes = {"draws": DRAWS, "kept_draws": 8, "draw_logprobs": True, "draw_seed": 9, "max_length": CONTEXT}
    vocab_size = AutoConfig.from_pretrained(folder).vocab_size  # with the padding columns of the head
    return making.tiny_header(folder, top_k=TOP_K).model_copy(update={**changes, "vocab_size": vocab_size})


@pytest.fixture(scope="module")
def sequences(folder: Path) -> list[TokenSequence]:
    source = SourceConfig(path="x.jsonl", loss_on="assistant", over_long="cut")
    maker = SequenceMaker(load_tokenizer(_config(folder)), source=source, max_length=CONTEXT)
    rows = [*making.chat_rows(12), {"text": "def f(x): return x\n" * 100}]
    made = [maker.make(SourceRow(i, row)) for i, row in enumerate(rows)]  # type: ignore[arg-type]
    assert all(isinstance(sequence, TokenSequence) for sequence in made)
    assert made[-1].token_ids.size == CONTEXT  # type: ignore[union-attr]
    return made  # type: ignore[return-value]


@pytest.fixture(scope="module")
def tap(folder: Path, header: DatasetHeader) -> Any:
    return _load(_config(folder), header)


@pytest.fixture(scope="module")
def by_tap(tap: Teacher, sequences: list[TokenSequence]) -> list[TeacherTargets]:
    return _targets(tap, sequences)


@pytest.fixture(scope="module")
def by_transformers(folder: Path, header: DatasetHeader, sequences: list[TokenSequence]) -> list[TeacherTargets]:
    drawing = _config(folder, "transformers", draws=DRAWS, kept_draws=8, draw_logprobs=True, draw_seed=9)
    return _targets(load_teacher(drawing, header), sequences)


def _assert_same(some: Sequence[TeacherTargets], others: Sequence[TeacherTargets], *, tail: float = TOLERANCE) -> None:
    for one, other in zip(some, others, strict=True):
        one, other = one.by_probability(), other.by_probability()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(one.label_logprob, other.label_logprob, atol=TOLERANCE)
        np.testing.assert_allclose(one.log_tail, other.log_tail, atol=tail)
        for n in range(one.positions):  # equal sets, but for ids within rounding of the last kept one
            last = other.logprobs[n, -1] + TOLERANCE
            assert set(other.ids[n, other.logprobs[n] > last]) <= set(one.ids[n])


def test_the_tap_gives_what_transformers_gives(
    by_tap: list[TeacherTargets], by_transformers: list[TeacherTargets], header: DatasetHeader
) -> None:
    _assert_same(by_tap, by_transformers)
    for targets in by_tap:
        targets.check(token_count=header.token_count)


def test_the_tap_draws_what_transformers_draws(
    by_tap: list[TeacherTargets], by_transformers: list[TeacherTargets]
) -> None:
    """The same uniforms; a draw may differ only where the cumulative sum passes its uniform by less than rounding."""
    drawn = same = 0
    for ours, reference in zip(by_tap, by_transformers, strict=True):
        assert ours.draw_logprobs is not None
        assert reference.draw_logprobs is not None
        if ours.draw_ids.size == reference.draw_ids.size:
            same += int((ours.draw_ids == reference.draw_ids).sum())
            np.testing.assert_allclose(np.sort(ours.draw_logprobs), np.sort(reference.draw_logprobs), atol=1e-3)
        drawn += reference.draw_ids.size
    assert drawn > 1000
    assert same >= 0.999 * drawn


def test_the_public_path_gives_the_same_but_for_the_mass_of_padding_columns(
    folder: Path, header: DatasetHeader, sequences: list[TokenSequence], by_transformers: list[TeacherTargets]
) -> None:
    no_draws = header.model_copy(update={"draws": 0, "kept_draws": 0, "draw_logprobs": False, "tail": "derived"})
    public = _targets(_load(_config(folder, tap="public"), no_draws), sequences)
    for ours, reference in zip(public, by_transformers, strict=True):
        ours.check(token_count=header.token_count)
        ours, reference = ours.by_probability(), reference.by_probability()
        np.testing.assert_array_equal(ours.ids[:, 0], reference.ids[:, 0])
        missing = reference.logprobs[:, 0] - ours.logprobs[:, 0]
        np.testing.assert_allclose(reference.logprobs[:, 1] - ours.logprobs[:, 1], missing, atol=TOLERANCE)
        certain = ours.among_kept(np.where(ours.among_kept(reference.ids[:, 2]), reference.ids[:, 2], -1))
        assert certain.any()
        assert (missing > 0).all()  # part of their softmax, and none of the targets'


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


def test_the_taps_values_and_draws_do_not_depend_on_the_order_of_rows(
    tap: Teacher, sequences: list[TokenSequence], by_tap: list[TeacherTargets]
) -> None:
    backwards = _targets(tap, sequences[::-1])[::-1]
    _assert_same(backwards, by_tap)
    same = sum(np.array_equal(one.draw_ids, other.draw_ids) for one, other in zip(backwards, by_tap, strict=True))
    assert same >= len(by_tap) - 1


def test_the_same_call_gives_the_same_bits(
    tap: Teacher, sequences: list[TokenSequence], by_tap: list[TeacherTargets]
) -> None:
    for first, second in zip(by_tap, _targets(tap, sequences), strict=True):
        for name in ("ids", "logprobs", "log_tail", "label_logprob", "draw_ids", "draw_logprobs"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_chunks_and_cached_prefixes_leave_no_position_out(
    folder: Path, header: DatasetHeader, sequences: list[TokenSequence], by_tap: list[TeacherTargets]
) -> None:
    """Prompts come in pieces of at most 48 tokens, and each row is asked for twice: its prefix is in the cache then."""
    arguments = {"max_num_batched_tokens": 48, "max_num_seqs": 8, "enable_prefix_caching": True}
    fast = header.model_copy(update={"order": "fast"})
    teacher = _load(_config(folder, engine_args=arguments), fast)
    _assert_same(_targets(teacher, sequences), by_tap)
    _assert_same(_targets(teacher, sequences), by_tap)


def test_overlapping_calls_give_what_calls_alone_give(
    tap: Teacher, sequences: list[TokenSequence], by_tap: list[TeacherTargets]
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
        _assert_same(results[part], by_tap[part::3])


@pytest.fixture(scope="module")
def generating(folder: Path, header: DatasetHeader) -> Any:
    """Little room for keys and values: while answers grow, requests are preempted and computed again."""
    arguments = {"block_size": 32, "num_gpu_blocks_override": 30, "max_num_seqs": 16, "disable_log_stats": False}
    changed = header.model_copy(update={"mode": "generate"})
    sampling = SamplingConfig(n=2, seed=4, max_tokens=120, temperature=0.9, top_p=0.95)
    return _load(_config(folder, engine_args=arguments), changed, sampling)


@pytest.fixture(scope="module")
def prompts(sequences: list[TokenSequence]) -> list[TokenSequence]:
    return [
        TokenSequence(
            sample_id=sequence.sample_id,
            source_row=sequence.source_row,
            token_ids=sequence.token_ids[:20],
            target_spans=np.empty((0, 2), np.int32),
            metadata=sequence.metadata,
        )
        for sequence in sequences[:8]
    ]


@pytest.fixture(scope="module")
def answers(generating: Teacher, prompts: list[TokenSequence]) -> list[ScoredSequence]:
    return generating.score(prompts)


def test_what_is_kept_while_answering_is_what_scoring_the_answer_gives(
    tap: Teacher, answers: list[ScoredSequence], header: DatasetHeader
) -> None:
    """Temperature and top-p change the answer, and nothing of the distributions."""
    _assert_same([answer.targets for answer in answers], _targets(tap, [answer.sequence for answer in answers]))
    for answer in answers:
        answer.targets.check(token_count=header.token_count)
        assert answer.targets.positions == answer.sequence.token_ids.size - 20
        assert answer.sequence.metadata["finish_reason"] in ("stop", "length")
    assert len({answer.sequence.sample_id for answer in answers}) == len(answers) == 16


def test_requests_that_were_preempted_are_whole(generating: Any, answers: list[ScoredSequence]) -> None:
    counters = {metric.name: metric for metric in generating._engine._llm.get_metrics()}
    assert counters["vllm:num_preemptions"].value > 0, "nothing was preempted: the test proves nothing"
    assert generating.environment["recomputed_positions"] > 0


def test_equal_prompts_and_seeds_give_equal_answers(
    generating: Teacher, prompts: list[TokenSequence], answers: list[ScoredSequence]
) -> None:
    again = generating.score(prompts)
    for one, other in zip(answers, again, strict=True):
        assert one.sequence.token_ids.tolist() == other.sequence.token_ids.tolist()
    assert len({tuple(answer.sequence.token_ids) for answer in answers}) > 8


def test_an_answer_ends_with_the_token_that_completes_a_stop_text(
    folder: Path, header: DatasetHeader, prompts: list[TokenSequence]
) -> None:
    """Or with an end token of the header, of which the model's own files need not know."""
    sampling = SamplingConfig(max_tokens=200, stop=("e",), seed=1)
    tokenizer = load_tokenizer(_config(folder))
    ends = (1, tokenizer.convert_tokens_to_ids("t"))
    changed = header.model_copy(update={"mode": "generate", "about": About(end_token_ids=ends)})
    answers = _load(_config(folder), changed, sampling).score(prompts)
    assert any(answer.sequence.token_ids[-1] == ends[1] for answer in answers)
    for answer in answers:
        text = tokenizer.decode(answer.sequence.token_ids[20:])
        assert not np.isin(answer.sequence.token_ids[20:-1], ends).any()
        if answer.sequence.metadata["finish_reason"] == "stop" and answer.sequence.token_ids[-1] not in ends:
            assert text.endswith("e")
            assert text.count("e") == 1
        assert answer.targets.positions == answer.sequence.token_ids.size - 20


@pytest.mark.parametrize(("head_dtype", "is_whole"), [("float32", True), ("bfloat16", False)])
def test_a_float32_head_keeps_the_order_that_a_bfloat16_head_rounds_away(
    folder: Path, header: DatasetHeader, sequences: list[TokenSequence], head_dtype: str, is_whole: bool
) -> None:
    facts = header.teacher.model_copy(update={"dtype": "bfloat16", "head_dtype": head_dtype})
    teacher = _load(_config(folder, dtype="bfloat16"), header.model_copy(update={"teacher": facts}))
    distinct = [len(set(entries)) for targets in _targets(teacher, sequences) for entries in targets.logprobs.tolist()]
    assert (np.mean(distinct) > TOP_K - 0.05) == is_whole


@pytest.mark.parametrize("way", ["worker", "public"])
def test_weights_that_give_no_finite_logits_are_named_before_any_row(
    folder: Path, header: DatasetHeader, tmp_path: Path, way: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(_config(folder)).save_pretrained(tmp_path / "broken")
    no_draws = header.model_copy(update={"draws": 0, "kept_draws": 0, "draw_logprobs": False, "tail": "derived"})
    with pytest.raises(TeacherUnusable, match=r"(?s)weights of .*NaN or infinite logits"):
        _load(_config(tmp_path / "broken", tap=way), header if way == "worker" else no_draws)


POISON = 250  # a token that no row has


@contextmanager
def _poisoned(teacher: Any) -> Iterator[None]:
    """While it lasts, the engine's embedding of one token is not a number."""
    (weight,) = teacher._engine._llm.apply_model(lambda model: model.model.embed_tokens.weight)
    before = weight[POISON].clone()
    with torch.no_grad():
        weight[POISON] = float("nan")
        yield
        weight[POISON] = before


def test_a_row_without_finite_logits_is_unscored_and_changes_no_bit_of_any_other(
    tap: Any, sequences: list[TokenSequence]
) -> None:
    tokens = sequences[3].token_ids.copy()
    position = int(sequences[3].target_spans[0, 0]) + 2
    tokens[position] = POISON
    batch = [*sequences[:3], replace(sequences[3], token_ids=tokens), *sequences[4:]]
    healthy = tap.score(batch)
    with _poisoned(tap):
        results = tap.score(batch)
    again = tap.score(batch)  # the cache blocks of the poisoned row are used again
    assert results.pop(3) == non_finite(sequences[3].sample_id, 3)
    for one, other in zip(results, [*healthy[:3], *healthy[4:]], strict=True):
        np.testing.assert_array_equal(one.targets.logprobs, other.targets.logprobs)
        np.testing.assert_array_equal(one.targets.draw_ids, other.targets.draw_ids)
    for one, other in zip(again, healthy, strict=True):
        np.testing.assert_array_equal(one.targets.logprobs, other.targets.logprobs)
    assert tap._engine.call_workers("coldstill_drop", []) == [0]


def test_a_prompt_without_finite_logits_gives_no_answers_and_the_others_get_theirs(
    generating: Any, prompts: list[TokenSequence], answers: list[ScoredSequence]
) -> None:
    spoiled = replace(prompts[2], token_ids=np.append(prompts[2].token_ids[:-1], np.int32(POISON)))
    with _poisoned(generating):
        results = generating.score([*prompts[:2], spoiled])
    assert results[4:] == [non_finite(f"{spoiled.sample_id}#{number}", 2) for number in range(2)]
    for one, other in zip(results[:4], answers[:4], strict=True):
        assert one.sequence.token_ids.tolist() == other.sequence.token_ids.tolist()
    assert generating._engine.call_workers("coldstill_drop", []) == [0]


def _fails(*_: object) -> Any:
    raise TeacherOutputInvalid("a test")


@pytest.mark.parametrize("kind", ["result", "take", "engine", "step"])
def test_after_an_error_the_worker_keeps_nothing_of_the_call(
    tap: Any, sequences: list[TokenSequence], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In a row's result, in the transfer of the results, in the engine after its steps, and in the tap's step."""
    monkeypatch.setattr(teacher_module, "_TAKEN_BYTES", 1)  # one row a message
    with monkeypatch.context() as patch:
        if kind == "result":
            patch.setattr(tap, "_result", _fails)
        elif kind == "take":
            original = tap._engine.call_workers
            broken = lambda method, *words: _fails() if method == "coldstill_take" else original(method, *words)  # noqa: E731
            patch.setattr(tap._engine, "call_workers", broken)
        elif kind == "engine":
            run = tap._engine.run
            patch.setattr(tap._engine, "run", lambda requests: _fails(run(requests)))
        else:
            patch.setattr(StepScorer, "_summary", _fails)
        with pytest.raises(TeacherOutputInvalid):
            tap.score(sequences)
    assert tap._engine.call_workers("coldstill_drop", []) == [0]
    tap.score(sequences[:2])
    assert tap._engine.call_workers("coldstill_drop", []) == [0]


@pytest.mark.parametrize("name", ["speculative_config", "max_logprobs", "worker_extension_cls"])
def test_engine_arguments_that_spoil_positions_are_refused(folder: Path, header: DatasetHeader, name: str) -> None:
    with pytest.raises(TeacherUnusable, match=name):
        load_teacher(_config(folder, engine_args={name: 1}), header)


def test_prefix_caching_is_refused_where_equal_captures_must_give_equal_bytes(
    folder: Path, header: DatasetHeader
) -> None:
    with pytest.raises(TeacherUnusable, match="enable_prefix_caching"):
        load_teacher(_config(folder, engine_args={"enable_prefix_caching": True}), header)


@pytest.mark.parametrize("changes", [{"tap": "public"}, {"runner": "v2"}])
def test_answers_need_the_tap_of_runner_v1(folder: Path, header: DatasetHeader, changes: dict[str, str]) -> None:
    with pytest.raises(TeacherUnusable, match="wanted: tap worker, runner v1"):
        load_teacher(_config(folder, **changes), header, SamplingConfig())


def test_settings_that_the_worker_finds_wrong_are_refused_by_name(folder: Path, header: DatasetHeader) -> None:
    with pytest.raises(TeacherUnusable, match=r"kv_sharing_fast_prefill.*\n.*\n.*tap: public"):
        load_teacher(_config(folder, engine_args={"kv_sharing_fast_prefill": True}), header)
