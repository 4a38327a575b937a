"""Students that attend across the rows of a pack are detected before the first step."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from coldstill.trainer.errors import PackingUnsupported
from coldstill.trainer.student.packing_check import check_packing
from tests.trainer.student.families import FAMILIES, tiny


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
