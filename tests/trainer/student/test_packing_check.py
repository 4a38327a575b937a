"""Students that attend across the rows of a pack are detected before the first step."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.inputs import real_model
from coldstill.trainer.errors import PackingUnsupported
from coldstill.trainer.student.forward import find_head
from coldstill.trainer.student.packing_check import check_packing, row_lengths
from tests.trainer.student.families import FAMILIES, tiny, tiny_of
from tests.trainer.training import build

CHUNKED = {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_keep_packed_rows_separate(family, attention):
    model = tiny(family)
    model.set_attn_implementation(attention)
    check_packing(model, batch_size=1, pack_length=48)
    check_packing(model, batch_size=4, pack_length=48)


def test_a_recurrent_student_is_a_named_error():
    fields = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "initializer_range": 0.3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **fields))
    with pytest.raises(PackingUnsupported, match="MambaForCausalLM") as error:
        check_packing(model, batch_size=2, pack_length=48)
    assert "pack_length to null" in error.value.fix


@pytest.mark.parametrize("chunk", [3, 8, 64, 100])
def test_chunks_that_the_pack_cuts_and_the_row_does_not_are_found_at_every_length(chunk):
    """Llama 4 cuts its chunks in the pack. So packs within one chunk are right, and all longer ones are not."""
    model = tiny_of("llama4_text", attention_chunk_size=chunk, **CHUNKED)
    formula, _ = find_head(model)
    for given in (formula, None):
        for pack_length in (chunk, *range(chunk + 1, chunk + 18), 4 * chunk + 17):
            if sum(row_lengths(pack_length, longest=1024)) <= chunk:
                check_packing(model, batch_size=1, pack_length=pack_length, formula=given)
                continue
            for batch_size in (1, 2):
                with pytest.raises(PackingUnsupported, match="logits of packed rows differ"):
                    check_packing(model, batch_size=batch_size, pack_length=pack_length, formula=given)


def test_a_training_checks_packs_of_its_own_length(tiny_dataset, tmp_path):
    chunked = lambda: tiny_of("llama4_text", attention_chunk_size=64, **CHUNKED)  # noqa: E731
    build(tiny_dataset, chunked(), tmp_path, pack_length=64)
    with pytest.raises(PackingUnsupported, match=r"(?s)Llama4ForCausalLM.*to at most 64, its attention_chunk_size"):
        build(tiny_dataset, chunked(), tmp_path, pack_length=128)


def test_test_rows_fill_the_pack_and_fit_the_positions_of_the_student():
    assert row_lengths(5, longest=1024) == (5, 3, 5, 4)
    assert row_lengths(48, longest=1024) == (5, 3, 5, 31, 4)
    assert row_lengths(100, longest=40) == (5, 3, 5, 40, 40, 3, 4)
    model = tiny_of("gpt2", n_positions=20)
    check_packing(model, batch_size=2, pack_length=100)


def test_a_student_that_fails_on_packs_is_a_named_error(monkeypatch):
    model = tiny("llama")

    def fail(*_, **__):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(type(model), "forward", fail)
    with pytest.raises(PackingUnsupported, match="shape mismatch"):
        check_packing(model, batch_size=2, pack_length=48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_as_before_afterwards(dtype):
    model = tiny(FAMILIES[0]).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_packing(model, batch_size=2, pack_length=64)
    check_packing(model, batch_size=2, pack_length=64, formula=find_head(model)[0])
    assert all(value.dtype == dtype and torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not real_model.is_installed(), reason="no package with a real model is installed")
def test_the_rounding_of_a_real_model_is_no_reason_to_refuse_packs():
    """In bfloat16, the logits of packed rows of this model differ by 4.9% of the largest; toys round far less."""
    model = AutoModelForCausalLM.from_pretrained(real_model.model_folder(), dtype=torch.bfloat16)
    check_packing(model, batch_size=2, pack_length=1024, formula=find_head(model)[0])
