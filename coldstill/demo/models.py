"""The demo's tokenizer, teacher and student, trained on the teacher's part of the text.

`python -m coldstill.demo.models {teacher|student} OUTPUT [--quick]` trains one model in its own process. The teacher's
stage also trains the tokenizer. Results are folders that transformers and vLLM load. Both models read the same text in
different orders: whole files first, then pairs in their chat form. The student reads less of it.

The tokenizer is a byte-level BPE of 8,192 entries, so it can encode any text. Its chat template marks the assistant's
tokens (`{% generation %}`), so one call returns both token ids and loss mask.

Shape letters: `N` blocks, `T` tokens of a block (`MAX_TOKENS`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldstill.common.files import new_folder

from .settings import MAX_TOKENS, STUDENT, TEACHER, Layout, Shape, size_of
from .text import read_rows

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 8_192

BEGIN, END, USER, ASSISTANT = SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")

WORD_PATTERN = r"\n[ ]*| ?_*[A-Za-z]+|_+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_]+|\s+"
"""Splits code before the merges: a line break keeps its indentation, a name is split before its underscores."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}\n"
    "{% else %}"
    "<|user|>\n{{ message['content'] }}\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The answer is enclosed in two special tokens. A line break before it would merge with its indentation, and no mask
can mark a token that is half the template's and half the assistant's."""

RAW_SHARE = 0.25
"""Share of the training tokens that come from whole files, read first. The rest come from pairs, as in the capture."""


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Learn the merges from `texts`. The same texts give the same tokenizer."""
    # The library reads this at its first use. Without it every later fork prints a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer saved in `folder`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def new_model(shape: Shape, *, vocabulary: int) -> LlamaForCausalLM:
    """A Llama with random weights and tied embeddings, which are most of a model this small."""
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
            # vLLM needs room for one token after the row.
            max_position_embeddings=2 * MAX_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def parameter_count(model: Any) -> int:
    """Number of parameters; a tied head is counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_blocks(layout: Layout, tokenizer: PreTrainedTokenizerFast, *, tokens: int, seed: int) -> torch.Tensor:
    """`int64 [N, T]`, about `tokens` in total: whole files of the teacher's part, then its pairs."""
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
    """Train and save the tokenizer, unless its folder exists."""
    if not layout.tokenizer.exists():
        tokenizer = train_tokenizer(row["text"] for row in read_rows(layout.rows("teacher", "raw")))
        with new_folder(layout.tokenizer) as folder:
            tokenizer.save_pretrained(folder)


def make_model(layout: Layout, final: Path, shape: Shape, *, tokens: int) -> None:
    """Train a model of this shape and save it, with the tokenizer, as the folder `final`."""
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
    """Train the model named on the command line."""
    arguments = argparse.ArgumentParser(description="Train one model of the demo.")
    arguments.add_argument("model", choices=["teacher", "student"])
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()
    layout, size = Layout(options.output), size_of(quick=options.quick)
    make_tokenizer(layout)
    if options.model == "teacher":
        make_model(layout, layout.teacher, TEACHER, tokens=size.teacher_tokens)
    else:
        make_model(layout, layout.student, STUDENT, tokens=size.student_tokens)


if __name__ == "__main__":
    main()
