"""The vision demo's tokenizer, teacher and student: Idefics3 models, trained on scenes that are drawn as they are read.

`python -m coldstill.demo.vision.models {teacher|student} OUTPUT [--quick]` trains one model in its own process. Results
are folders that transformers and vLLM load, each with its processor.

A step computes the features of an image once and asks several questions about it, each in a row of its own: answers in
one row would give each other away. The first scenes have one thing, because a model that has not yet found out what
colors and shapes look like learns it from them much sooner.

Shape letters: `S` scenes of a step, `B` rows of a step, `T` tokens of the longest row, `D` width of the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from coldstill.common.files import new_folder
from coldstill.demo.models import byte_level_tokenizer, parameter_count, train_steps

from .scenes import SIDE, Chat, machine_fonts, make_chat, texts
from .settings import STUDENT, TEACHER, Layout, Shape, size_of

if TYPE_CHECKING:
    from PIL import Image

END, USER, ASSISTANT = "<end_of_utterance>", "<|user|>", "<|assistant|>"
"""Idefics3's processor adds the first to any tokenizer that lacks it."""
IMAGE_TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>")
"""Idefics3's own: an image becomes the first, `<global-img>`, its `<image>` tokens, and the first again."""
VOCABULARY = 512

CHAT_TEMPLATE = (
    "{% macro shown(content) %}"
    "{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ shown(message['content']) }}<end_of_utterance>{% endgeneration %}"
    "{% else %}"
    "<|user|>{{ shown(message['content']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Content is text or parts, as SmolVLM's template takes it."""

WORD_PATTERN = r" ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9]"
"""Words and digits become one token each, with the space before them."""

SCENES_PER_STEP, QUESTIONS_PER_SCENE = 16, 5
RATES = 0.01, 3e-3
"""Peak learning rates of Muon and AdamW. Muon's is half of the text demo's, at which it learned more slowly here."""
POSITION_STD = 0.5
"""Initial size of the position embeddings of patches. At transformers' 0.02 they vanish beside a patch's pixels, and
the models learn late where things are."""
EASY_SHARE = 0.15
"""Share of the steps in which the most things of a scene rises from one to four."""


def train_tokenizer() -> Any:
    """A byte-level BPE that has learned the words of all questions and answers. Always the same."""
    return byte_level_tokenizer(
        texts(),
        vocabulary=VOCABULARY,
        pattern=WORD_PATTERN,
        special_tokens=[END, USER, ASSISTANT, *IMAGE_TOKENS],
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT, *IMAGE_TOKENS],
        chat_template=CHAT_TEMPLATE,
    )


def new_processor(shape: Shape, tokenizer: Any) -> Any:
    """The processor of a model of this shape: every image becomes one tile of `SIDE` pixels square."""
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    edge = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    return Idefics3Processor(
        images, tokenizer, image_seq_len=image_tokens(shape), chat_template=tokenizer.chat_template
    )


def image_tokens(shape: Shape) -> int:
    """Tokens that an image becomes, without those around it."""
    return (SIDE // shape.patch // shape.merged) ** 2


def new_model(shape: Shape, tokenizer: Any) -> Any:
    """An Idefics3 model with random weights and tied embeddings."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    torch.manual_seed(shape.seed)
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.width // 32,
            "num_key_value_heads": shape.width // 32,
            "intermediate_size": shape.feed_forward,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": shape.vision_width,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_width // 32,
            "intermediate_size": shape.vision_feed_forward,
            "image_size": SIDE,
            "patch_size": shape.patch,
        },
        scale_factor=shape.merged,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        model.model.vision_model.embeddings.position_embedding.weight.normal_(std=POSITION_STD)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


class Batch(NamedTuple):
    """Rows of one question each, right-padded.

    `token_ids int64`, `loss_mask bool` and `attention_mask int64` are `[B, T]`. `pixels float32 [I, 3, SIDE, SIDE]` are
    those of the `I` different images, and `owners int64` has the number of each image that the rows show, in order. The
    first `short_rows` rows are the short ones, which are computed apart: their padding would be a fifth of a step.
    """

    token_ids: torch.Tensor
    loss_mask: torch.Tensor
    attention_mask: torch.Tensor
    pixels: torch.Tensor
    owners: torch.Tensor
    short_rows: int


class ChatEncoder:
    """Makes batches of chats as a model's processor would, but each image once."""

    def __init__(self, processor: Any):
        self.tokenizer = processor.tokenizer
        self.image_id = self.tokenizer.convert_tokens_to_ids("<image>")
        around, whole = self.tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<global-img>"])
        self.expansion = [around, whole, *[self.image_id] * processor.image_seq_len, around]
        # Lists, and questions about two images, are longer.
        self.short_row = len(self.expansion) + 13
        self._row = lru_cache(1 << 16)(self._encoded)

    def batch(self, chats: Sequence[Chat]) -> Batch:
        """All questions of `chats`, one row each; those of at most `short_row` tokens come first."""
        images: list[Image.Image] = []
        asked: list[tuple[list[int], list[int], range]] = []
        for chat in chats:
            own = range(len(images), len(images) + len(chat.scenes))
            images += [scene.image for scene in chat.scenes]
            asked += [(*self._row(len(own), turn.question, turn.answer), own) for turn in chat.turns]
        asked.sort(key=lambda row: len(row[0]) > self.short_row)
        ids = [torch.tensor(ids) for ids, _, _ in asked]
        pad = torch.nn.utils.rnn.pad_sequence
        return Batch(
            pad(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            pad([torch.tensor(mask, dtype=torch.bool) for _, mask, _ in asked], batch_first=True),
            pad([torch.ones_like(row) for row in ids], batch_first=True),
            pixels(images),
            torch.tensor([owner for _, _, own in asked for owner in own], dtype=torch.int64),
            sum(len(row[0]) <= self.short_row for row in asked),
        )

    def _encoded(self, images: int, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a row with its images expanded, and its loss mask."""
        parts = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        encoded = self.tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids: list[int] = []
        mask: list[int] = []
        for token, marked in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            expanded = self.expansion if token == self.image_id else [token]
            ids += expanded
            mask += [marked] * len(expanded)
        return ids, mask


def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """`float32 [I, 3, SIDE, SIDE]`: what the processor makes of images of this size."""
    if not images:
        return torch.empty(0, 3, SIDE, SIDE)
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def target_hidden(model: Any, batch: Batch) -> torch.Tensor:
    """`float32 [M, D]`: hidden states at the `M` positions whose next token is in the loss mask."""
    embedded = model.model.text_model.embed_tokens(batch.token_ids)
    if len(batch.pixels):
        # `[:, None]`: one image of each "row" of the vision encoder.
        features = model.model.get_image_features(batch.pixels[:, None]).pooler_output
        is_image = (batch.token_ids == model.config.image_token_id)[:, :, None].expand_as(embedded)
        embedded = embedded.masked_scatter(is_image, features[batch.owners].flatten())
    found = []
    for rows in (slice(0, batch.short_rows), slice(batch.short_rows, len(embedded))):
        if rows.start == rows.stop:
            continue
        length = int(batch.attention_mask[rows].sum(1).max())
        states = model.model.text_model(
            inputs_embeds=embedded[rows, :length],
            attention_mask=batch.attention_mask[rows, :length],
            use_cache=False,
        ).last_hidden_state
        found.append(states[:, :-1][batch.loss_mask[rows, 1:length]])
    return torch.cat(found)


def target_labels(batch: Batch) -> torch.Tensor:
    """`int64 [M]`: the tokens that `target_hidden` predicts."""
    return batch.token_ids[:, 1:][batch.loss_mask[:, 1:]]


def make_model(layout: Layout, final: Path, shape: Shape, *, steps: int) -> None:
    """Train a model of this shape and save it, with its processor, as the folder `final`."""
    from transformers.utils import logging

    logging.disable_progress_bar()

    tokenizer = train_tokenizer()
    processor = new_processor(shape, tokenizer)
    model, encoder, fonts = new_model(shape, tokenizer), ChatEncoder(processor), machine_fonts()

    def loss_of(step: int) -> torch.Tensor:
        most = min(4, 1 + int(step / max(1, steps) / EASY_SHARE * 3))
        first = step * SCENES_PER_STEP
        chats = [
            make_chat(seed=shape.seed, part="teacher", number=number, turns=QUESTIONS_PER_SCENE, most=most, fonts=fonts)
            for number in range(first, first + SCENES_PER_STEP)
        ]
        batch = encoder.batch(chats)
        return functional.cross_entropy(model.lm_head(target_hidden(model, batch)), target_labels(batch))

    checkpoint = layout.root / f".{final.name}.checkpoint.pt"
    label = f"{final.name}, {parameter_count(model) / 1e6:.1f} M"
    train_steps(model, loss_of, steps=steps, rates=RATES, checkpoint=checkpoint, label=label)
    with new_folder(final) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    """Train the model named on the command line."""
    arguments = argparse.ArgumentParser(description="Train one model of the vision demo.")
    arguments.add_argument("model", choices=["teacher", "student"])
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()
    layout, size = Layout(options.output), size_of(quick=options.quick)
    torch.set_num_threads(1)  # the other model trains at the same time
    if options.model == "teacher":
        make_model(layout, layout.teacher, TEACHER, steps=size.teacher_steps)
    else:
        make_model(layout, layout.student, STUDENT, steps=size.student_steps)


if __name__ == "__main__":
    main()
