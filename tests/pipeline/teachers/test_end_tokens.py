"""Laws of the teacher's end tokens: those of its generation config and its tokenizer, one list for all engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, GenerationConfig

from coldstill.pipeline.config import SamplingConfig, TeacherConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.teachers.checkpoint import end_token_ids
from coldstill.pipeline.teachers.endpoint_payload import answer_fields
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.pipeline.teachers.transformers_teacher import TransformersTeacher
from coldstill.storage_schema.header_facts import About
from tests import making
from tests.pipeline.capturing import capture_config


def _ends(folder: Path, **config: Any) -> tuple[int, ...]:
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return end_token_ids(TeacherConfig(model=str(folder)), AutoTokenizer.from_pretrained(folder))


def test_end_tokens_are_those_of_generation_config_and_tokenizer(tmp_path: Path) -> None:
    folder = making.chat_model(tmp_path)
    GenerationConfig(eos_token_id=[0, 7, 10**6]).save_pretrained(folder)
    assert _ends(folder) == (0, 1, 7)  # an id that the tokenizer does not have can never be written
    GenerationConfig(eos_token_id=7).save_pretrained(folder)
    assert _ends(folder) == (1, 7)
    GenerationConfig().save_pretrained(folder)
    assert _ends(folder) == (1,)


@pytest.mark.parametrize(("stored", "wanted"), [(7, (1,)), ([0, 7], (0, 1)), (None, (1,))])
def test_without_a_generation_config_an_ordinary_token_of_config_json_ends_nothing(
    tmp_path: Path, stored: object, wanted: tuple[int, ...]
) -> None:
    """A class of transformers has a default that belongs to another tokenizer: Llama's is 2."""
    folder = making.chat_model(tmp_path)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert _ends(folder, eos_token_id=stored) == wanted


def test_a_config_of_code_that_the_user_trusts_names_end_tokens_too(tmp_path: Path) -> None:
    folder = making.chat_model(tmp_path)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "own.py").write_text(
        "import transformers\nclass Own(transformers.LlamaConfig):\n    model_type = 'own'\n"
    )
    path = folder / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}, "eos_token_id": [0, 1]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    tokenizer = AutoTokenizer.from_pretrained(making.chat_model(tmp_path / "plain"))
    trusting = TeacherConfig(model=str(folder), engine_args={"trust_remote_code": True})
    assert end_token_ids(trusting, tokenizer) == (0, 1)


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_the_header_names_the_end_tokens_of_the_capture(tmp_path: Path, mode: str) -> None:
    config = capture_config(tmp_path, mode=mode)
    GenerationConfig(eos_token_id=[1, 0]).save_pretrained(config.teacher.model)
    assert prepare(config).header.about.end_token_ids == (0, 1)


def test_answers_of_every_engine_end_at_the_headers_end_tokens(tmp_path: Path) -> None:
    folder = making.chat_model(tmp_path, seed=2)
    config = TeacherConfig.model_validate(
        {"model": str(folder), "engine": "transformers", "dtype": "float32", "max_length": 64, "top_k": 8, "draws": 0}
    )
    sampling = SamplingConfig(max_tokens=20, seed=7)
    header = making.tiny_header(folder, max_length=64, vocab_size=300, draws=0)
    prompt = TokenSequence(
        sample_id="p",
        source_row=0,
        token_ids=np.array([4, 5, 6], np.int32),
        target_spans=np.empty((0, 2), np.int32),
        metadata={},
    )
    (whole,) = TransformersTeacher(config, header, sampling).score([prompt])
    end = int(whole.sequence.token_ids[3 + 4])
    ending = header.model_copy(update={"about": About(end_token_ids=(1, end))})
    (short,) = TransformersTeacher(config, ending, sampling).score([prompt])
    length = 4 + whole.sequence.token_ids[3:].tolist().index(end)
    assert short.sequence.token_ids.tolist() == whole.sequence.token_ids[:length].tolist()
    assert short.sequence.metadata["finish_reason"] == "stop"
    fields = answer_fields(ending, sampling=sampling, room=9, seed=1)
    assert (fields["stop_token_ids"], fields["ignore_eos"]) == ([1, end], True)
    assert "ignore_eos" not in answer_fields(header, sampling=sampling, room=9, seed=1)
