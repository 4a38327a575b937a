"""Write the tiny models and texts of the debug configs into `debug/` below the working folder.

    python -m examples.debug.prepare

- `teacher`, `other_teacher`, `student`: Llamas on one byte-level BPE tokenizer with a ChatML template.
- `other_student`: a Llama with another tokenizer and another chat template.
- `adapter`: a LoRA adapter of `teacher`.
- `chats.jsonl`: rows {id, messages}. `text.jsonl`: rows {id, text}.

All weights are random, so what the configs show is that a setting runs, not that a student gets better. The same
versions of the libraries write the same files. Whatever exists already is kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from coldstill.common.files import new_file, new_folder

ROOT = Path("debug")
CONTEXT = 256
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
COLORS = ("red", "green", "blue", "yellow", "white", "black", "gray", "brown")
THINGS = ("door", "lamp", "river", "stone", "book", "garden", "window", "café")


def chats() -> Iterator[dict[str, Any]]:
    """64 short chats; every fourth has a system message, every third a second question."""
    for number in range(64):
        color, thing = COLORS[number % 8], THINGS[number // 8]
        messages = [{"role": "system", "content": "Answer in one sentence."}] if number % 4 == 0 else []
        messages += [
            {"role": "user", "content": f"Which color has the {thing} number {number}?"},
            {"role": "assistant", "content": f"The {thing} number {number} is {color}."},
        ]
        if number % 3 == 0:
            messages += [
                {"role": "user", "content": "And the one next to it?"},
                {"role": "assistant", "content": f"It is {COLORS[(number + 1) % 8]}, not {color}."},
            ]
        yield {"id": f"chat-{number}", "messages": messages}


def texts() -> Iterator[dict[str, Any]]:
    """32 short documents."""
    for number in range(32):
        color, thing = COLORS[number % 8], THINGS[number // 4]
        text = f"The {thing} at the end of the street is {color}. " + f"It was {color} {number} years ago too. " * 2
        yield {"id": f"text-{number}", "text": text.strip()}


def make_tokenizer(*, entries: int, tokens: dict[str, str], template: str, only_texts: bool = False) -> Any:
    """A byte-level BPE of at most `entries` ids, learned from the rows; `tokens` are its special ones by their role."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [row["text"] for row in texts()]
    if not only_texts:
        lines += [message["content"] for row in chats() for message in row["messages"]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(tokens.values()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=entries, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    roles = {name: token for name, token in tokens.items() if name.endswith("_token")}
    extra = [token for name, token in tokens.items() if name not in roles]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **roles,
        additional_special_tokens=extra,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Any, *, seed: int, width: int = 64) -> Any:
    """A Llama of 2 layers with random weights. vLLM's CPU attention needs heads at least 32 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=CONTEXT + 1,  # vLLM needs room for one token after the row
            initializer_range=0.1,  # by default a random model's distributions are all but uniform
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _save(name: str, *parts: Any) -> None:
    with new_folder(ROOT / name) as folder:
        for part in parts:
            part.save_pretrained(folder)


def _make_adapter() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(ROOT / "teacher")
    torch.manual_seed(3)
    # By default the second factor is 0, and the adapter changes nothing.
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(teacher, settings)


def prepare() -> None:
    """Write all that does not exist yet."""
    ROOT.mkdir(exist_ok=True)
    for name, rows in (("chats", chats()), ("text", texts())):
        if not (ROOT / f"{name}.jsonl").exists():
            with new_file(ROOT / f"{name}.jsonl") as beside:
                Path(beside).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ids = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "start": "<|im_start|>"}
    tokenizer = make_tokenizer(entries=400, tokens=ids, template=CHATML)
    for name, seed, width in (("teacher", 0, 64), ("other_teacher", 1, 96), ("student", 2, 32)):
        if not (ROOT / name).exists():
            _save(name, make_model(tokenizer, seed=seed, width=width), tokenizer)
    if not (ROOT / "other_student").exists():
        ids = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        other = make_tokenizer(entries=320, tokens=ids, template=OTHER_TEMPLATE, only_texts=True)
        _save("other_student", make_model(other, seed=2, width=32), other)
    if not (ROOT / "adapter").exists():
        _save("adapter", _make_adapter())


if __name__ == "__main__":
    prepare()
