"""The chat templates of `examples/` render what the models expect, and mark exactly the assistant's turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coldstill.pipeline.config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.rows import span_positions
from tests import making

TEMPLATES = Path(__file__).parents[1] / "examples" / "chat_templates"
SYSTEM = {
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen2": "You are a helpful assistant.",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(making.chat_model(tmp_path_factory.mktemp("m")))


@pytest.mark.parametrize("name", sorted(SYSTEM))
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_templates_render_chatml_and_mark_the_assistant(
    tokenizer: PreTrainedTokenizerBase, name: str, system: str | None
) -> None:
    turns = [("user", "hi"), ("assistant", "hello\nyou"), ("user", "and?"), ("assistant", "bye")]
    turns = [("system", system), *turns] if system else turns
    shown = turns if system else [("system", SYSTEM[name]), *turns]
    messages = [{"role": role, "content": content} for role, content in turns]
    source = SourceConfig(path="x.jsonl", chat_template=str(TEMPLATES / f"{name}.jinja"))
    sequence = SequenceMaker(tokenizer, source=source, max_length=2000).make(SourceRow(0, {"messages": messages}))
    assert isinstance(sequence, TokenSequence)
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in shown)
    assert tokenizer.decode(sequence.token_ids) == text
    marked = tokenizer.decode(sequence.token_ids[span_positions(sequence.target_spans) + 1])
    assert marked == "hello\nyou<|im_end|>bye<|im_end|>"


@pytest.mark.parametrize("content", ["and?", [{"type": "text", "text": "and?"}]])
def test_the_template_of_internvl_renders_chatml_with_one_placeholder_for_each_image(
    tokenizer: PreTrainedTokenizerBase, content: object
) -> None:
    images = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [
        {"role": "user", "content": images},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "and a dog"},
    ]
    template = (TEMPLATES / "internvl.jinja").read_text()
    shown = ["<IMG_CONTEXT>\n<IMG_CONTEXT>\nwhat?", "a cat", "and?", "and a dog"]
    roles = ["user", "assistant"] * 2
    turns = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, shown, strict=True)]
    render = tokenizer.apply_chat_template
    assert render(messages, chat_template=template, tokenize=False) == "".join(turns)
    prompt = render(messages[:3], chat_template=template, tokenize=False, add_generation_prompt=True)
    assert prompt == "".join(turns[:3]) + "<|im_start|>assistant\n"
    encoded = render(messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
    marked = [id_ for id_, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "a cat<|im_end|>and a dog<|im_end|>"
