"""Laws of the transformers engine: answers and what is kept of them, the head's data type, faults by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.teachers.protocol import TokenSequence, non_finite
from coldstill.pipeline.teachers.transformers_teacher import TransformersTeacher
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.errors import InvalidRow
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import CachedRow, TeacherTargets
from tests import making
from tests.trainer.student.families import tiny_of

TOP_K, DRAWS, MAX_LENGTH = 12, 16, 64
TOLERANCE = 1e-4  # in log-prob: one pass over the whole answer against token by token, in float32
VALUES = ("logprobs", "log_tail", "label_logprob")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.chat_model(tmp_path_factory.mktemp("teacher"), seed=2)


def _header(folder: Path, **changes: Any) -> DatasetHeader:
    return making.tiny_header(
        folder, top_k=TOP_K, draws=DRAWS, draw_logprobs=True, max_length=MAX_LENGTH, vocab_size=300, **changes
    )


def _config(folder: Path, **changes: Any) -> TeacherConfig:
    fields = {"model": str(folder), "engine": "transformers", "dtype": "float32", "max_length": MAX_LENGTH}
    return TeacherConfig.model_validate(
        {**fields, "top_k": TOP_K, "min_prob": 0.0, "draws": DRAWS, "draw_logprobs": True, **changes}
    )


def _teacher(folder: Path, **sampling: Any) -> TransformersTeacher:
    settings = SamplingConfig.model_validate({"max_tokens": 20, "seed": 7, **sampling})
    return TransformersTeacher(_config(folder), _header(folder), settings)


def _prompts(count: int) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    return [
        TokenSequence(
            sample_id=f"p{i}",
            source_row=i,
            token_ids=rng.integers(2, 258, 3 + 5 * i).astype(np.int32),
            target_spans=np.empty((0, 2), np.int32),
            metadata={"topic": i},
        )
        for i in range(count)
    ]


def _assert_close(ours: TeacherTargets, reference: TeacherTargets) -> None:
    for name in VALUES:
        np.testing.assert_allclose(getattr(ours, name), getattr(reference, name), atol=TOLERANCE)
    np.testing.assert_array_equal(ours.counts, reference.counts)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.4, "top_p": 0.9, "n": 3}, {"temperature": 0}])
def test_what_is_kept_on_the_way_equals_a_later_score_of_the_answer(folder: Path, sampling: dict[str, Any]) -> None:
    teacher, header = TransformersTeacher(_config(folder), _header(folder)), _header(folder)
    answers = _teacher(folder, **sampling).score(_prompts(4))
    assert len(answers) == 4 * sampling.get("n", 1)
    for sequence, targets in answers:
        again = teacher.score([sequence])[0].targets
        _assert_close(targets, again)
        np.testing.assert_array_equal(targets.draw_ids, again.draw_ids)
        assert targets.draw_logprobs is not None
        assert again.draw_logprobs is not None
        np.testing.assert_allclose(targets.draw_logprobs, again.draw_logprobs, atol=TOLERANCE)
        row = CachedRow(
            sample_id=sequence.sample_id,
            token_ids=sequence.token_ids,
            target_spans=sequence.target_spans,
            targets=targets,
            metadata=sequence.metadata,
        )
        row.check(token_count=header.token_count)


def test_an_answer_does_not_depend_on_the_other_prompts(folder: Path) -> None:
    teacher, prompts = _teacher(folder, n=2), _prompts(3)
    together = teacher.score(prompts)
    alone = [answer for prompt in prompts[::-1] for answer in teacher.score([prompt])]
    by_name = {answer.sequence.sample_id: answer for answer in alone}
    assert [answer.sequence.sample_id for answer in together] == ["p0#0", "p0#1", "p1#0", "p1#1", "p2#0", "p2#1"]
    for sequence, targets in together:
        other = by_name[sequence.sample_id]
        np.testing.assert_array_equal(sequence.token_ids, other.sequence.token_ids)
        np.testing.assert_array_equal(targets.logprobs, other.targets.logprobs)
        np.testing.assert_array_equal(targets.draw_ids, other.targets.draw_ids)
    assert len({tuple(answer.sequence.token_ids[-5:]) for answer in together}) > 3


def test_temperature_0_writes_what_transformers_writes(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, answer in zip(_prompts(4), _teacher(folder, temperature=0).score(_prompts(4)), strict=True):
        tokens = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
        # Columns of the head's padding cannot be answered.
        padding = list(range(_header(folder).token_count, model.config.vocab_size))
        wanted = model.generate(tokens, do_sample=False, max_new_tokens=20, suppress_tokens=padding, pad_token_id=1)
        assert answer.sequence.token_ids.tolist() == wanted[0].tolist()
        assert answer.sequence.sample_id == prompt.sample_id
        assert answer.sequence.metadata["topic"] == prompt.metadata["topic"]


def test_an_answer_ends_with_the_token_that_completes_a_stop_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = {answer.sequence.sample_id: answer for answer in _teacher(folder).score(_prompts(4))}
    text = tokenizer.decode(whole["p1"].sequence.token_ids[8:])
    stop = text[4:7]
    sequence, targets = _teacher(folder, stop=["never to be seen", stop]).score(_prompts(4)[1:2])[0]
    assert tokenizer.decode(sequence.token_ids[8:]) == text[: text.index(stop) + len(stop)]
    assert sequence.metadata["finish_reason"] == "stop"
    assert sequence.target_spans.tolist() == [[7, sequence.token_ids.size - 1]]
    _assert_close(targets, whole["p1"].targets.slice(0, targets.positions))


def test_the_end_of_turn_is_the_last_token_and_a_target(folder: Path, tmp_path: Path) -> None:
    """The generation config may name more end tokens than the tokenizer."""
    full = _teacher(folder).score(_prompts(1))[0].sequence
    end = int(full.token_ids[3 + 4])
    making.chat_model(tmp_path, seed=2)
    GenerationConfig(eos_token_id=[1, end]).save_pretrained(tmp_path)
    sequence, targets = _teacher(tmp_path).score(_prompts(1))[0]
    length = 3 + 1 + full.token_ids[3:].tolist().index(end)
    assert sequence.token_ids.tolist() == full.token_ids[:length].tolist()
    assert sequence.metadata["finish_reason"] == "stop"
    assert targets.positions == length - 3


def test_an_answer_ends_at_max_tokens_and_at_max_length(folder: Path) -> None:
    long = TokenSequence(
        sample_id="long",
        source_row=0,
        token_ids=np.full(MAX_LENGTH - 2, 9, np.int32),
        target_spans=np.empty((0, 2), np.int32),
    )
    for prompt, room in ((_prompts(1)[0], 3), (long, 2)):
        (answer,) = _teacher(folder, max_tokens=3).score([prompt])
        assert answer.targets.positions == room
        assert answer.sequence.metadata["finish_reason"] == "length"


@pytest.mark.parametrize("tokens", [0, MAX_LENGTH])
def test_a_prompt_without_room_for_an_answer_is_named(folder: Path, tokens: int) -> None:
    prompt = TokenSequence(
        sample_id="full",
        source_row=0,
        token_ids=np.full(tokens, 9, np.int32),
        target_spans=np.empty((0, 2), np.int32),
    )
    with pytest.raises(InvalidRow, match="'full'"):
        _teacher(folder).score([prompt])


def _bfloat16(folder: Path, head_dtype: str) -> tuple[TransformersTeacher, TokenSequence]:
    base = _header(folder)
    header = base.model_copy(
        update={"teacher": base.teacher.model_copy(update={"dtype": "bfloat16", "head_dtype": head_dtype})}
    )
    sequence = TokenSequence(
        sample_id="a",
        source_row=0,
        token_ids=np.random.default_rng(1).integers(2, 258, 30).astype(np.int32),
        target_spans=np.array([[0, 29]], np.int32),
    )
    return TransformersTeacher(_config(folder, dtype="bfloat16"), header), sequence


def test_a_float32_head_on_bfloat16_weights_gives_float32_logits(folder: Path) -> None:
    teacher, sequence = _bfloat16(folder, "float32")
    ((_, targets),) = teacher.score([sequence])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = torch.from_numpy(sequence.token_ids.astype(np.int64))
    hidden = model.model(input_ids=tokens[None]).last_hidden_state[0, :-1]
    logits = hidden.double() @ model.lm_head.weight.double().T
    wanted = torch.log_softmax(logits[:, : _header(folder).token_count], -1)
    labels = wanted[torch.arange(29), tokens[1:]].detach().numpy()
    np.testing.assert_allclose(targets.label_logprob, labels, atol=1e-5)
    np.testing.assert_allclose(targets.logprobs, wanted.topk(TOP_K).values.detach().numpy(), atol=1e-5)


def test_a_head_in_the_models_data_type_gives_the_models_own_logits(folder: Path) -> None:
    teacher, sequence = _bfloat16(folder, "bfloat16")
    ((_, targets),) = teacher.score([sequence])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = torch.from_numpy(sequence.token_ids.astype(np.int64))
    logits = model(input_ids=tokens[None]).logits[0, :-1, : _header(folder).token_count]
    wanted = torch.log_softmax(logits.double(), -1)[torch.arange(29), tokens[1:]].detach().numpy()
    np.testing.assert_allclose(targets.label_logprob, wanted, atol=1e-5)
    other, _ = _bfloat16(folder, "float32")
    assert np.abs(other.score([sequence])[0].targets.label_logprob - wanted).max() > 1e-4


def test_a_head_that_has_no_float32_copy_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda model: torch.nn.Bilinear(1, 1, 1))
    with pytest.raises(TeacherUnusable, match="head_dtype: model"):
        _bfloat16(folder, "float32")


def test_a_row_of_logits_that_are_no_numbers_is_unscored(folder: Path) -> None:
    teacher, answering = TransformersTeacher(_config(folder), _header(folder)), _teacher(folder)
    for head in (teacher._model.get_output_embeddings(), answering._model.get_output_embeddings()):
        head.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, torch.tensor([5]), torch.nan))
    sequence = TokenSequence(
        sample_id="a",
        source_row=0,
        token_ids=np.arange(9, dtype=np.int32),
        target_spans=np.array([[3, 5]], np.int32),
    )
    assert teacher.score([sequence]) == [non_finite("a", 0)]
    assert answering.score(_prompts(1))[0] == non_finite("p0", 0)


def test_weights_without_finite_logits_are_named_at_the_start(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(TeacherUnusable, match=r"(?s)weights of .*NaN or infinite logits in 3 of 3.*finite logits"):
        TransformersTeacher(_config(tmp_path), _header(folder))


def test_progress_grows_within_a_call(folder: Path) -> None:
    teacher = _teacher(folder)
    assert teacher.processes == ()
    before = teacher.progress
    teacher.score(_prompts(1))
    assert teacher.progress >= before + 20


def test_a_sequence_without_targets_gives_none(folder: Path) -> None:
    ((_, targets),) = TransformersTeacher(_config(folder), _header(folder)).score(_prompts(1))
    assert targets.positions == 0


def _capped(folder: Path) -> Path:
    """A Gemma 2 with a soft-cap of its attention scores, and the tokenizer of `chat_model`."""
    making.chat_model(folder, seed=2)
    model = tiny_of(
        "gemma2",
        vocab_size=AutoConfig.from_pretrained(folder).vocab_size,
        attn_logit_softcapping=10.0,
        query_pre_attn_scalar=16,
        initializer_range=0.5,
    )
    model.save_pretrained(folder)
    return folder


def test_attention_that_the_default_computes_wrongly_is_eager(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _capped(tmp_path)
    sequence = TokenSequence(
        sample_id="a",
        source_row=0,
        token_ids=np.random.default_rng(1).integers(2, 258, 40).astype(np.int32),
        target_spans=np.array([[0, 39]], np.int32),
    )
    ((_, targets),) = TransformersTeacher(_config(folder), _header(folder)).score([sequence])
    assert "attention sdpa gives logits that differ" in caplog.text
    tokens = torch.from_numpy(sequence.token_ids.astype(np.int64))
    found = {}
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1, : _header(folder).token_count]
        found[attention] = torch.log_softmax(logits.double(), -1)[torch.arange(39), tokens[1:]].numpy()
    np.testing.assert_allclose(targets.label_logprob, found["eager"], atol=TOLERANCE)
    assert np.abs(targets.label_logprob - found["sdpa"]).max() > 0.1


def test_attention_that_the_user_named_and_that_is_wrong_is_refused(tmp_path: Path) -> None:
    folder = _capped(tmp_path)
    with pytest.raises(TeacherUnusable, match="attn_implementation") as error:
        TransformersTeacher(_config(folder, engine_args={"attn_implementation": "sdpa"}), _header(folder))
    assert "set it to eager" in error.value.fix
    TransformersTeacher(_config(folder, engine_args={"attn_implementation": "eager"}), _header(folder))


def test_a_teacher_that_attends_to_later_tokens_is_refused(tmp_path: Path) -> None:
    making.chat_model(tmp_path)
    tiny_of("bert", vocab_size=AutoConfig.from_pretrained(tmp_path).vocab_size, is_decoder=False).save_pretrained(
        tmp_path
    )
    with pytest.raises(TeacherUnusable, match="depend on later tokens"):
        TransformersTeacher(_config(tmp_path), _header(tmp_path))


def test_a_model_that_transformers_cannot_load_is_named(tmp_path: Path, folder: Path) -> None:
    config = TeacherConfig(model=str(tmp_path), engine="transformers", top_k=8, max_length=64)
    with pytest.raises(TeacherUnusable, match="transformers loads"):
        load_teacher(config, making.tiny_header(folder))
