"""A row that the student has no positions for is a named error before the first step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from coldstill import load_logit_dataset
from coldstill.storage_schema.dataset import open_dataset
from coldstill.trainer.config import StudentConfig
from coldstill.trainer.errors import RowTooLong
from coldstill.trainer.evaluation.evaluate import evaluate_on_dataset
from coldstill.trainer.student.images import images_of
from coldstill.trainer.student.load import load_student
from coldstill.trainer.student.positions import check_lengths, context_of, table_length
from tests import making, vision
from tests.trainer.training import build

N = 16
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": N}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": N,
}
BART = {
    "d_model": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": N,
}
NEO = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
TABLES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "openai-gpt": GPT,
    "gptj": {**GPT, "rotary_dim": 4},  # sines and cosines, made once
    "codegen": {**GPT, "n_head": 4, "rotary_dim": 4},
    "ctrl": {**GPT, "dff": 16},
    "gpt_neo": {**NEO, "max_position_embeddings": N},
    "opt": {**BERT, "word_embed_proj_dim": 16, "ffn_dim": 16},
    "biogpt": BERT,
    "bart": BART,
    "bert": {**BERT, "is_decoder": True},
    "roberta": {**BERT, "is_decoder": True},  # its first positions belong to padding
    "mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": N},
}
ENDLESS: dict[str, dict[str, Any]] = {
    "llama": BERT,
    "gpt_neox": BERT,
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "xglm": {"d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 16, "max_position_embeddings": N},
}


def small(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=making.VOCABULARY, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def computes(model: Any, tokens: int) -> bool:
    try:
        model(input_ids=torch.arange(2, tokens + 2)[None] % making.VOCABULARY, use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", TABLES)
def test_a_table_of_positions_is_as_long_as_the_longest_row_that_computes(family):
    model = small(family, **TABLES[family])
    limit = table_length(model)
    assert limit is not None
    assert computes(model, limit)
    assert not computes(model, limit + 1)


@pytest.mark.parametrize("family", ENDLESS)
def test_positions_that_go_on_have_no_table(family):
    model = small(family, **ENDLESS[family])
    assert table_length(model) is None
    assert computes(model, N + 1)


def test_the_positions_of_patches_are_not_those_of_text(tmp_path):
    assert table_length(load_vision(tmp_path)) is None


def load_vision(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(vision.llava_model(folder / "student"))


def longest_of(dataset: Path) -> int:
    opened = open_dataset(str(dataset))
    return max(opened.row(number).token_ids.size for number in range(len(opened)))


def test_a_row_without_positions_is_a_named_error_before_the_first_step(tiny_dataset: Path, tmp_path: Path):
    longest = longest_of(tiny_dataset)
    model = small("gpt2", **{**GPT, "n_positions": longest - 1})
    with pytest.raises(RowTooLong) as error:
        build(tiny_dataset, model, tmp_path)
    assert error.value.found == f"up to {longest} tokens"
    assert f"at most {longest - 1}" in error.value.wanted
    assert f'coldstill subset {tiny_dataset} OUTPUT --filter "tokens <= {longest - 1}"' in error.value.fix
    with pytest.raises(RowTooLong):
        evaluate_on_dataset(model, tiny_dataset, tokenizers_are_checked=True)
    held_out = load_logit_dataset(tiny_dataset)
    with pytest.raises(RowTooLong):
        check_lengths(held_out, model, name="s")


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_virtual_tokens_take_positions_from_the_rows(tiny_dataset: Path, tmp_path: Path, kind, caplog):
    longest = longest_of(tiny_dataset)
    more = {"encoder_hidden_size": 8} if kind is PromptEncoderConfig else {}
    prompt = kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **more)

    def prompted(family: str, **settings: Any) -> Any:
        return get_peft_model(small(family, **settings), prompt)

    model = prompted("gpt2", **{**GPT, "n_positions": longest + 2})
    with pytest.raises(RowTooLong, match="beside its 3 virtual tokens") as error:
        build(tiny_dataset, model, tmp_path)
    assert f"at most {longest - 1}," in error.value.wanted
    with pytest.raises(RowTooLong):
        evaluate_on_dataset(model, tiny_dataset, tokenizers_are_checked=True)
    trainer, _ = build(tiny_dataset, prompted("gpt2", **{**GPT, "n_positions": longest + 3}), tmp_path, max_steps=1)
    trainer.train()
    dataset = load_logit_dataset(tiny_dataset)
    context = dataset.header.max_length + 2
    check_lengths(dataset, prompted("llama", **{**BERT, "max_position_embeddings": context}), name="s")
    assert f'--filter "tokens <= {context - 3}"' in caplog.text


def test_virtual_tokens_take_positions_from_rows_with_images_too(tmp_path: Path):
    student = vision.llava_model(tmp_path / "student")
    rows = vision.vision_rows(student, [1, 2], size=(70, 40))
    dataset = vision.vision_dataset(tmp_path / "data", [rows], tokenizer=student)
    longest = max(row.token_ids.size + 15 * len(row.media) for row in rows if row.media)
    model = load_vision(tmp_path)
    model.config.text_config.max_position_embeddings = longest + 2

    def stream(virtual: int) -> Any:
        prompt = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
        images = images_of(get_peft_model(copy.deepcopy(model), prompt))
        return load_logit_dataset(dataset).stream(batch_size=1, seed=0, epochs=1, images=images)

    assert list(stream(2))
    with pytest.raises(RowTooLong, match="beside its 3 virtual tokens") as error:
        list(stream(3))
    assert f"at most {longest - 1}," in error.value.wanted


def test_rows_that_fit_train_whatever_the_header_allows_also_in_packs_longer_than_the_table(
    tiny_dataset: Path, tmp_path: Path, caplog
):
    longest = longest_of(tiny_dataset)
    assert open_dataset(str(tiny_dataset)).header.max_length > longest
    model = small("gpt2", **{**GPT, "n_positions": longest})
    trainer, _ = build(tiny_dataset, model, tmp_path, max_steps=2, pack_length=3 * longest)
    assert "context" not in caplog.text
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_context_shorter_than_the_rows_of_the_dataset_is_told_with_the_way_out(tiny_dataset, caplog):
    dataset = load_logit_dataset(tiny_dataset)
    for context, told in ((dataset.header.max_length - 1, True), (dataset.header.max_length, False)):
        model = load_student(
            StudentConfig(from_scratch={"model_type": "llama", **BERT, "max_position_embeddings": context}),
            dataset.header,
        )
        assert context_of(model.config) == context
        caplog.clear()
        with caplog.at_level("WARNING"):
            check_lengths(dataset, model, name="s")
        assert (f'--filter "tokens <= {context}"' in caplog.text) is told
