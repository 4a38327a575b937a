"""Students from files and from scratch, and the errors of those that do not fit the dataset."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import TokenizerMismatch, TokenizerNotFound
from coldstill.trainer.config import StudentConfig
from coldstill.trainer.errors import AdapterMisfit, AttentionMismatch, StudentHeadTooSmall, StudentNotFound
from coldstill.trainer.evaluation.measured_model import load_measured
from coldstill.trainer.student.load import check_attention, load_student
from coldstill.trainer.student.tokenizer import check_tokenizer, tokenizer_files
from tests import making
from tests.trainer.student.families import tiny, tiny_of
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
    [{"model": "nowhere/at-all"}, {"from_scratch": "nowhere/at-all"}, {"from_scratch": {"model_type": "lama"}}],
)
def test_a_missing_student_is_a_named_error(header, config):
    with pytest.raises(StudentNotFound, match="student"):
        load_student(StudentConfig.model_validate(config), header)


def test_a_head_with_too_few_rows_is_a_named_error_and_one_with_more_is_fine(header, tmp_path):
    with pytest.raises(StudentHeadTooSmall, match="60 rows") as error:
        load_student(StudentConfig(from_scratch={**SMALL, "vocab_size": 60}), header)
    assert "resize_token_embeddings(64)" in error.value.fix
    load_student(StudentConfig(from_scratch={**SMALL, "vocab_size": making.VOCABULARY + 128}), header)


def test_another_tokenizer_and_a_missing_one_are_named_errors(tiny_dataset, header, tmp_path):
    other = making.tiny_tokenizer(tmp_path / "other", vocabulary=60)
    files = tokenizer_files(StudentConfig(model=str(other)), open_dataset(tiny_dataset))
    with pytest.raises(TokenizerMismatch, match="60 ids"):
        check_tokenizer(files["tokenizer.json"], header, name="other")
    (other / "tokenizer.json").unlink()
    with pytest.raises(TokenizerNotFound, match=r"tokenizer\.json"):
        tokenizer_files(StudentConfig(model=str(other)), open_dataset(tiny_dataset))
    (other / "tokenizer.json").write_text(json.dumps({}))
    with pytest.raises(TokenizerNotFound):
        check_tokenizer(b"{}", header, name="other")


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
