"""Students from files and from scratch, and the errors of those that do not fit the dataset."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import TokenizerMismatch, TokenizerNotFound
from coldstill.trainer.config import LoraConfig, StudentConfig
from coldstill.trainer.errors import (
    AdapterMisfit,
    AttentionMismatch,
    SpecialTokenInvalid,
    StudentHeadTooSmall,
    StudentNotFound,
)
from coldstill.trainer.evaluation.measured_model import load_measured
from coldstill.trainer.student.load import SpecialTokens, check_attention, load_student
from coldstill.trainer.student.lora import outside_language_model, with_adapters
from coldstill.trainer.student.tokenizer import check_tokenizer, special_tokens, tokenizer_files
from tests import making
from tests.trainer.student.families import FAMILIES, tiny, tiny_of
from tests.trainer.training import build


@pytest.fixture
def header(tiny_dataset: Path):
    return open_dataset(tiny_dataset).header


SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


def test_from_scratch_takes_a_mapping_and_a_row_per_id_of_the_tokenizer(header):
    torch.manual_seed(0)
    model = load_student(StudentConfig(from_scratch=SMALL), header)
    assert model.get_output_embeddings().weight.shape == (making.VOCABULARY, 16)
    torch.manual_seed(0)
    again = load_student(StudentConfig(from_scratch=SMALL), header)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_from_scratch_takes_a_folder_and_leaves_its_weights(header, tiny_student):
    model = load_student(StudentConfig(from_scratch=str(tiny_student)), header)
    trained = LlamaForCausalLM.from_pretrained(tiny_student)
    assert model.config.hidden_size == trained.config.hidden_size
    assert not torch.equal(model.lm_head.weight, trained.lm_head.weight)


def test_a_student_from_scratch_has_the_dataset_s_tokenizer(tiny_dataset, header):
    files = tokenizer_files(StudentConfig(from_scratch=SMALL), open_dataset(tiny_dataset))
    check_tokenizer(files["tokenizer.json"], header, name="new")


@pytest.mark.parametrize(("weights", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_have_the_requested_dtype(header, tiny_student, weights, dtype):
    model = load_student(StudentConfig(model=str(tiny_student), weights=weights), header)
    assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_only_adapters_are_trained_and_they_are_float32(header, tiny_student):
    config = StudentConfig.model_validate({"model": str(tiny_student), "weights": "bfloat16", "lora": {"r": 2}})
    model = load_student(config, header)
    learned = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert learned
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in learned.items())
    assert not any("lm_head" in name for name in learned)


def test_an_unknown_layer_is_a_named_error(header, tiny_student):
    config = StudentConfig.model_validate({"model": str(tiny_student), "lora": {"target_modules": ["nowhere"]}})
    with pytest.raises(AdapterMisfit, match="nowhere"):
        load_student(config, header)


@pytest.mark.parametrize(
    "config",
    [
        {"model": "nowhere/at-all"},
        {"from_scratch": "nowhere/at-all"},
        {"from_scratch": str(Path(__file__).parent)},
        {"from_scratch": {"model_type": "lama"}},
        {"from_scratch": {**SMALL, "hidden_size": "wide"}},
    ],
)
def test_a_missing_student_is_a_named_error(header, config):
    with pytest.raises(StudentNotFound, match="student") as caught:
        load_student(StudentConfig.model_validate(config), header)
    assert "no such folder" not in str(caught.value)  # it is a Hub name, is there, or is no folder at all


def test_a_head_with_too_few_rows_is_a_named_error_and_one_with_more_is_fine(header, tmp_path):
    with pytest.raises(StudentHeadTooSmall, match="60 rows") as error:
        load_student(StudentConfig(from_scratch={**SMALL, "vocab_size": 60}), header)
    assert "vocab_size: 64 in student.from_scratch" in error.value.fix
    with pytest.raises(StudentHeadTooSmall, match="60 rows") as error:
        load_student(StudentConfig(model=str(making.tiny_llama(tmp_path / "narrow", vocabulary=60))), header)
    assert "resize_token_embeddings(64)" in error.value.fix
    load_student(StudentConfig(from_scratch={**SMALL, "vocab_size": making.VOCABULARY + 128}), header)


def test_another_tokenizer_a_missing_one_and_that_of_a_run_s_folder_are_named_errors(tiny_dataset, header, tmp_path):
    other = making.tiny_tokenizer(tmp_path / "other", vocabulary=60)
    files = tokenizer_files(StudentConfig(model=str(other)), open_dataset(tiny_dataset))
    with pytest.raises(TokenizerMismatch, match="60 ids"):
        check_tokenizer(files["tokenizer.json"], header, name="other")
    (other / "tokenizer.json").unlink()
    with pytest.raises(TokenizerNotFound, match=r"tokenizer\.json") as error:
        tokenizer_files(StudentConfig(model=str(other)), open_dataset(tiny_dataset))
    assert f"processing_class, or save it there with `save_pretrained`; that of the dataset is in {tiny_dataset}/" in (
        error.value.fix
    )
    (other / "tokenizer.json").write_text(json.dumps({}))
    with pytest.raises(TokenizerNotFound):
        check_tokenizer(b"{}", header, name="other")
    run = making.tiny_tokenizer(tmp_path / "run" / "student").parent
    with pytest.raises(TokenizerNotFound) as error:
        tokenizer_files(StudentConfig(model=str(run)), open_dataset(tiny_dataset))
    assert error.value.fix == f"did you mean {run / 'student'}?"


SPECIAL = SpecialTokens(bos=0, pad=None, ends=(1, 5), token_count=making.VOCABULARY)
"""Ids that no class of transformers has as its defaults."""
SCRATCH = {
    **{family: {**SMALL, "model_type": family} for family in ("llama", "qwen2", "gemma2", "cohere", "phi3", "glm4")},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 64},
    "opt": {
        "model_type": "opt",
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    },
}


def tokens_of(model: Any) -> list[Any]:
    return [
        getattr(part, f"{kind}_token_id")
        for part in (model.config, model.generation_config)
        for kind in ("bos", "eos", "pad")
    ]


@pytest.mark.parametrize("family", SCRATCH)
def test_a_student_from_scratch_names_the_tokens_of_the_tokenizer_beside_it(header, tmp_path, family):
    model = load_student(StudentConfig(from_scratch=SCRATCH[family]), header, SPECIAL)
    assert model.get_input_embeddings().padding_idx is None
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tokens_of(loaded) == [0, 1, None, 0, [1, 5], None]


def test_the_configuration_of_another_model_gives_its_shape_and_not_its_tokens(header, tmp_path):
    other = making.tiny_llama(tmp_path / "other", bos_token_id=9, eos_token_id=8)
    model = load_student(StudentConfig(from_scratch=str(other)), header, SPECIAL)
    assert tokens_of(model) == [0, 1, None, 0, [1, 5], None]


def test_a_token_that_the_user_sets_is_kept_and_one_that_is_no_id_is_a_named_error(header):
    model = load_student(StudentConfig(from_scratch={**SMALL, "eos_token_id": 3}), header, SPECIAL)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (3, [3, 1, 5])
    for value in (making.VOCABULARY, -1, "</s>", [1, 99]):
        with pytest.raises(SpecialTokenInvalid, match="eos_token_id"):
            load_student(StudentConfig(from_scratch={**SMALL, "eos_token_id": value}), header, SPECIAL)


def test_a_pretrained_student_stops_where_its_answers_end_and_this_is_said(header, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    folder = making.tiny_llama(tmp_path / "base", eos_token_id=7, pad_token_id=63)
    model = load_student(StudentConfig(model=str(folder)), header, SPECIAL)
    assert tokens_of(model) == [0, 7, 63, 0, [7, 1, 5], 63]
    assert "stops at [7]" in caplog.text
    caplog.clear()
    same = making.tiny_llama(tmp_path / "same", eos_token_id=1)
    before = LlamaForCausalLM.from_pretrained(same)
    alike = SpecialTokens(bos=None, pad=None, ends=(1,), token_count=making.VOCABULARY)
    assert tokens_of(load_student(StudentConfig(model=str(same)), header, alike)) == tokens_of(before)
    assert "stops at" not in caplog.text


def test_an_id_that_no_tokenizer_has_is_replaced_in_a_pretrained_student(header, tmp_path):
    folder = making.tiny_llama(tmp_path / "base", vocabulary=100, eos_token_id=99)
    model = load_student(StudentConfig(model=str(folder)), header, SPECIAL)
    assert tokens_of(model) == [0, 1, None, 0, [1, 5], None]


def test_special_tokens_are_read_from_the_files_and_the_teacher_s_ends_from_the_header(tmp_path):
    folder = making.tiny_tokenizer(tmp_path)
    header = making.tiny_header(folder, about={"end_token_ids": [1, 4, 1000]})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = special_tokens(files, header)
    assert found == SpecialTokens(bos=0, pad=None, ends=(1, 4), token_count=making.VOCABULARY)
    bare = special_tokens({"tokenizer.json": files["tokenizer.json"], "tokenizer_config.json": b"[1"}, header)
    assert bare == SpecialTokens(bos=None, pad=None, ends=(1, 4), token_count=making.VOCABULARY)
    older = {
        "tokenizer.json": files["tokenizer.json"],
        "special_tokens_map.json": b'{"eos_token": {"content": "</s>"}}',
    }
    assert special_tokens(older, making.tiny_header(folder)).ends == (1,)


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def with_eyes(kind: str) -> Any:
    """A tiny model with a vision tower, for text."""
    text = {**SMALL, "vocab_size": making.VOCABULARY, "head_dim": 16}
    if kind == "gemma3":
        config = Gemma3Config(
            text_config={**text, "model_type": "gemma3_text"},
            vision_config={**VISION, "image_size": 28, "patch_size": 14},
        )
        return Gemma3ForConditionalGeneration(config)
    vision = {**VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 16}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=63))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.q_proj"])
@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_only_the_language_model_gets_adapters(kind, targets):
    model = with_eyes(kind)
    adapted = with_adapters(model, LoraConfig(r=2, target_modules=targets))
    names = {name for name, part in adapted.named_modules() if isinstance(part, BaseTunerLayer)}
    assert names
    assert all("language_model" in name for name in names)
    tokens = torch.arange(5)[None]
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    adapted(input_ids=tokens).logits.square().mean().backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_language_model_is_adapted_everywhere_but_in_its_head(family):
    model = tiny(family)
    assert outside_language_model(model) == []


def test_adapters_on_adapters_are_a_named_error(header, tiny_student, tmp_path):
    first = with_adapters(LlamaForCausalLM.from_pretrained(tiny_student), LoraConfig(r=2))
    first.save_pretrained(tmp_path)
    config = StudentConfig.model_validate({"model": str(tmp_path), "lora": {"r": 2}})
    with pytest.raises(AdapterMisfit, match="adapters already"):
        load_student(config, header)
    again = load_student(StudentConfig(model=str(tmp_path)), header)
    assert any(weight.requires_grad for weight in again.parameters())


def test_a_student_trains_and_is_measured_with_the_attention_of_its_configuration(
    tiny_dataset, tmp_path, caplog: pytest.LogCaptureFixture
):
    """Gemma 2's soft-cap of attention scores, which sdpa drops."""
    logging.getLogger("transformers").propagate = True
    folder = tmp_path / "student"
    tiny("gemma2").save_pretrained(folder)
    making.tiny_tokenizer(folder)
    trainer, gradients = build(tiny_dataset, tiny("gemma2"), tmp_path / "run", max_steps=1)
    assert trainer.model.config._attn_implementation == "eager"
    assert "attention sdpa gives logits that differ" in caplog.text
    trainer.train()
    eager = tiny("gemma2")
    eager.set_attn_implementation("eager")
    other, wanted = build(tiny_dataset, eager, tmp_path / "other", max_steps=1)
    other.train()
    torch.testing.assert_close(gradients.steps[0], wanted.steps[0])
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation == "eager"
    measured = load_measured(str(folder), open_dataset(tiny_dataset), role="student")
    assert measured.config._attn_implementation == "eager"


def test_attention_that_the_user_named_and_that_is_wrong_is_an_error(header, tmp_path):
    tiny("gemma2").save_pretrained(tmp_path)
    model = load_student(StudentConfig(model=str(tmp_path), attention="sdpa"), header)
    with pytest.raises(AttentionMismatch, match="attention sdpa gives logits that differ") as error:
        check_attention(model, name="it")
    assert "set student.attention to eager" in error.value.fix
    check_attention(load_student(StudentConfig(model=str(tmp_path), attention="eager"), header), name="it")


def test_a_student_that_attends_to_later_tokens_is_an_error(tiny_dataset, tmp_path):
    with pytest.raises(AttentionMismatch, match="BertLMHeadModel that depend on later tokens"):
        build(tiny_dataset, tiny_of("bert", is_decoder=False), tmp_path)
