"""The demo's models: in comes the teacher's part of the text, out go folders that transformers and vLLM load.

A process of its own per model: `python -m demo.models teacher OUTPUT [--quick]`. The teacher's stage also trains the
tokenizer. Both models read the same text in another order: first whole files, then pairs in their chat form; the
student reads less of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import new_folder
from .settings import FULL, MAX_TOKENS, QUICK, STUDENT, TEACHER, Layout, Shape, Size
from .text import read_rows
from .tokenizer import load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

RAW_SHARE = 0.25
"""Share of the training tokens that are whole files, read first; the rest are pairs, as the capture asks for."""


def new_model(shape: Shape, *, vocabulary: int) -> LlamaForCausalLM:
    """A Llama with random weights; its head is its embedding, which is most of a model this small."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(shape.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.width // shape.heads,
            intermediate_size=shape.feed_forward,
            # vLLM asks for room for a token after the row.
            max_position_embeddings=2 * MAX_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def parameter_count(model: Any) -> int:
    """All of them; a tied head is counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_blocks(layout: Layout, tokenizer: PreTrainedTokenizerFast, *, tokens: int, seed: int) -> torch.Tensor:
    """`int64 [N, MAX_TOKENS]`, about `tokens` in all: whole files of the teacher's part, then its pairs."""
    import torch

    from .pretrain import pack

    files = [row["text"] for row in read_rows(layout.rows("teacher", "raw"))]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    raw = pack([[begin, *ids, end] for ids in tokenizer(files)["input_ids"]], block=MAX_TOKENS, seed=seed)
    chats = [row["messages"] for row in read_rows(layout.rows("teacher", "pairs"))]
    encoded = tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True)["input_ids"]
    blocks = tokens // MAX_TOKENS
    raw = raw[: int(blocks * RAW_SHARE)]
    pairs = pack(encoded, block=MAX_TOKENS, seed=seed + 1)[: blocks - len(raw)]
    return torch.cat([raw, pairs])


def make_tokenizer(layout: Layout) -> None:
    """Train and save the tokenizer, unless it is there."""
    if not layout.tokenizer.exists():
        tokenizer = train_tokenizer(row["text"] for row in read_rows(layout.rows("teacher", "raw")))
        with new_folder(layout.tokenizer) as folder:
            tokenizer.save_pretrained(folder)


def make_model(layout: Layout, final: Path, shape: Shape, *, tokens: int) -> None:
    """Train a model of this shape and save it, with the tokenizer beside it, as the folder `final`."""
    from transformers.utils import logging

    from .pretrain import pretrain

    logging.disable_progress_bar()

    tokenizer = load_tokenizer(layout.tokenizer)
    model = new_model(shape, vocabulary=len(tokenizer))
    blocks = training_blocks(layout, tokenizer, tokens=tokens, seed=shape.seed)
    checkpoint = layout.root / f".{final.name}.checkpoint.pt"
    pretrain(model, blocks, checkpoint=checkpoint, label=f"{final.name}, {parameter_count(model) / 1e6:.1f} M")
    with new_folder(final) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    """Make one of the two models."""
    arguments = argparse.ArgumentParser(description="Train one model of the demo.")
    arguments.add_argument("model", choices=["teacher", "student"])
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--quick", action="store_true")
    asked = arguments.parse_args()
    layout = Layout(asked.output)
    size: Size = QUICK if asked.quick else FULL
    make_tokenizer(layout)
    if asked.model == "teacher":
        make_model(layout, layout.teacher, TEACHER, tokens=size.teacher_tokens)
    else:
        make_model(layout, layout.student, STUDENT, tokens=size.student_tokens)


if __name__ == "__main__":
    main()
