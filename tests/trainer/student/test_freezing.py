"""Freezing by name: the same names mean the same parts in each family, and a name that means nothing is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from coldstill.trainer.config import StudentConfig
from coldstill.trainer.errors import AdapterMisfit, NothingToFreeze
from coldstill.trainer.student.freezing import freeze
from coldstill.trainer.student.load import check_trainable
from tests import vision

PARTS = {
    "idefics3": {"vision_tower": "model.vision_model.", "projector": "model.connector."},
    "llava": {"vision_tower": "model.vision_tower.", "projector": "model.multi_modal_projector."},
}


@pytest.fixture(scope="module", params=PARTS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    make = {"idefics3": vision.idefics3_model, "llava": vision.llava_model}[request.param]
    return request.param, make(tmp_path_factory.mktemp("model"))


def frozen(model: torch.nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


def test_names_mean_the_same_parts_in_each_family(family: tuple[str, Path]) -> None:
    name, folder = family
    parts = PARTS[name]
    everything = set(dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters()))
    wanted = {part: {path for path in everything if path.startswith(start)} for part, start in parts.items()}
    wanted["language_model"] = everything - set().union(*wanted.values())
    for names in ([part] for part in wanted):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        freeze(model, names, student="s")
        assert frozen(model) == wanted[names[0]] != set()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    freeze(model, ["vision_tower", "projector"], student="s")
    assert frozen(model) == wanted["vision_tower"] | wanted["projector"]
    check_trainable(model, name="s")
    freeze(model, ["language_model"], student="s")
    with pytest.raises(AdapterMisfit, match=r"student\.freeze"):
        check_trainable(model, name="s")


def test_a_module_s_own_name_or_a_part_of_its_path_is_taken_as_whole_words(family: tuple[str, Path]) -> None:
    for name, wanted in {
        "layers.0": ".layers.0.",
        "lm_head": "lm_head.",
        "embed_tokens": ".embed_tokens.",
        "layers.1.mlp": ".layers.1.mlp.",
    }.items():
        model = AutoModelForImageTextToText.from_pretrained(family[1])
        freeze(model, [name], student="s")
        assert frozen(model) == {
            path for path in dict(model.named_parameters()) if wanted in f".{path}" or path.startswith(wanted)
        }
    for name in ("layer", "layers.", "visio", "mlp.layers", ""):
        with pytest.raises(NothingToFreeze):
            freeze(model, [name], student="s")


def test_a_name_that_means_nothing_is_an_error_that_lists_the_modules(
    family: tuple[str, Path], tiny_student: Path
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(family[1])
    with pytest.raises(NothingToFreeze, match=r"student\.freeze: eyes") as error:
        freeze(model, ["vision_tower", "eyes"], student="s")
    for part in PARTS[family[0]].values():
        assert part.strip(".") in str(error.value.wanted)
    text = AutoModelForCausalLM.from_pretrained(tiny_student)
    for name in ("vision_tower", "projector", "language_model"):
        with pytest.raises(NothingToFreeze):
            freeze(text, [name], student="s")
    freeze(text, ["embed_tokens", "model.layers.0"], student="s")
    assert {name.split(".")[1] for name in frozen(text)} == {"embed_tokens", "layers"}


def test_a_merger_inside_the_tower_is_the_projector() -> None:
    """As in Qwen's families."""
    vision_config = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    config = AutoConfig.for_model("qwen2_vl", vision_config=vision_config, text_config=text)
    model = AutoModelForImageTextToText.from_config(config)
    freeze(model, ["vision_tower"], student="s")
    assert any("merger" in path for path in dict(model.named_parameters()))
    assert not any("merger" in path for path in frozen(model))
    freeze(model, ["projector"], student="s")
    assert {path for path in dict(model.named_parameters()) if "visual" in path} == frozen(model)


def test_lora_and_freeze_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="remove freeze"):
        StudentConfig(model="m", lora={}, freeze=["vision_tower"])
