"""An attention implementation that computes something else than the eager one is found, whatever the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from coldstill.common.attention import LARGEST_WINDOW, attends_ahead, use_correct_attention
from tests.trainer.student.families import FAMILIES, tiny, tiny_of

GEMMA_2 = {"query_pre_attn_scalar": 16, "head_dim": 16}


@pytest.fixture
def named() -> Iterator[Any]:
    """Registers an implementation of attention under a name, until the end of the test."""
    names: list[str] = []

    def register(name: str, function: Any, mask: Any) -> None:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)
        names.append(name)

    yield register
    for name in names:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def checked(model: PreTrainedModel) -> str | None:
    """The implementation that was replaced, if any; everything else about the model must be as before."""
    before = {name: (it.dtype, it.clone()) for name, it in model.state_dict().items()}
    config, modes = model.config.to_dict(), [part.training for part in model.modules()]
    with torch.no_grad():
        found = use_correct_attention(model)
    assert [part.training for part in model.modules()] == modes
    assert model.config.to_dict() == config
    for name, it in model.state_dict().items():
        assert it.dtype == before[name][0]
        assert torch.equal(it, before[name][1])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    return None if found is None else found.implementation


@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.02, 0.3])
@pytest.mark.parametrize("cap", [10.0, 50.0])
def test_a_soft_cap_that_the_default_drops_is_found_at_every_size_of_the_weights(cap, size, dtype, layers):
    fields = {**GEMMA_2, "initializer_range": size, "num_hidden_layers": layers, "dtype": dtype}
    model = tiny_of("gemma2", attn_logit_softcapping=cap, **fields).train()
    assert model.config._attn_implementation == "sdpa"
    assert checked(model) == "sdpa"
    assert model.config._attn_implementation == "eager"
    without = tiny_of("gemma2", attn_logit_softcapping=None, **fields).train()
    assert checked(without) is None
    assert without.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_an_implementation_that_is_right_is_kept(family, dtype):
    model = tiny(family).to(dtype).train()
    assert checked(model) is None
    assert model.config._attn_implementation == "sdpa"


def test_sinks_that_an_implementation_ignores_are_found(named):
    named("without_sinks", sdpa_attention_forward, sdpa_mask)
    model = tiny_of("gpt_oss", attn_implementation="without_sinks")
    assert checked(model) == "without_sinks"


@pytest.mark.parametrize("window", [8, LARGEST_WINDOW, 4096])
def test_a_window_that_an_implementation_ignores_is_found_at_every_length(named, window):
    def mask(*args: Any, mask_function: Any = None, **options: Any) -> Any:
        return sdpa_mask(*args, mask_function=causal_mask_function, **options | {"allow_is_causal_skip": False})

    named("without_window", sdpa_attention_forward, mask)
    model = tiny_of("mistral", sliding_window=window, attn_implementation="without_window")
    assert checked(model) == "without_window"
    model.config._attn_implementation = "sdpa"
    assert checked(model) is None


def test_a_class_that_has_no_other_implementation_or_fails_is_left_as_it_is(monkeypatch):
    assert checked(tiny_of("mamba")) is None
    model = tiny("llama")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(type(model), "forward", fail)
    assert checked(model) is None
    assert model.config._attn_implementation == "sdpa"
    assert not attends_ahead(model)


def test_a_model_that_attends_to_later_tokens_is_found():
    for kind, changes in (("bert", {"is_decoder": False}), ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 2})):
        with torch.no_grad():
            assert attends_ahead(tiny_of(kind, **changes))
    for model in (tiny_of("bert", is_decoder=True), *map(tiny, FAMILIES)):
        with torch.no_grad():
            assert not attends_ahead(model)
