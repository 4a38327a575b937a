"""Tiny vision-language models of two families that share one tokenizer, and images to show them. All real."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 32
"""Side of a tile of the tiny models, in pixels."""

_IDEFICS3_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}:{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
"""As that of SmolVLM: content is text or parts."""


def vision_tokenizer(template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level tokenizer with the special tokens of Idefics3, of which LLaVA needs `<image>` alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<end_of_utterance>", pad_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(_IDEFICS3_TOKENS)})
    tokenizer.chat_template = template
    return tokenizer


def idefics3_processor(tokenizer: Any, *, splits: bool = False) -> Any:
    """4 image tokens per tile; `splits`: larger images become up to 2 x 2 tiles and the whole."""
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE if splits else SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=splits,
    )
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)


def llava_processor(tokenizer: Any) -> Any:
    """16 image tokens per image."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def _text_config(tokenizer: Any, *, hidden: int, layers: int, context: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "max_position_embeddings": context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def idefics3_model(
    folder: Path,
    *,
    splits: bool = False,
    seed: int = 0,
    layers: int = 2,
    context: int = 1024,
    vision_heads: int = 1,
    template: str | None = CHAT_TEMPLATE,
) -> Path:
    """A random tiny Idefics3 (SmolVLM's family) with its processor."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    tokenizer = vision_tokenizer(template)
    torch.manual_seed(seed)
    config = Idefics3Config(
        text_config=_text_config(tokenizer, hidden=64, layers=layers, context=context),
        vision_config={
            "hidden_size": 32 * vision_heads,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": vision_heads,
            "image_size": SIDE,
            "patch_size": 8,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    idefics3_processor(tokenizer, splits=splits).save_pretrained(folder)
    return folder


def llava_model(folder: Path, *, seed: int = 0, context: int = 1024, template: str | None = CHAT_TEMPLATE) -> Path:
    """A random tiny LLaVA with its processor."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = vision_tokenizer(template)
    torch.manual_seed(seed)
    config = LlavaConfig(
        text_config=_text_config(tokenizer, hidden=64, layers=2, context=context),
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": SIDE,
            "patch_size": 8,
            "projection_dim": 32,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    llava_processor(tokenizer).save_pretrained(folder)
    return folder


def image_bytes(seed: int = 0, *, size: tuple[int, int] = (40, 30), mode: str = "RGB", format: str = "PNG") -> bytes:
    """A file with an image of random colors, `size` in pixels (width, height)."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def vision_rows(
    folder: Path, counts: list[int], *, seed: int = 0, size: tuple[int, int] = (40, 30), top_k: int = 8, draws: int = 4
) -> list[Any]:
    """Chats with `counts` images each, in and between the text of the question, and a random teacher on the answers.

    `folder`: a model's, whose tokenizer and template make the ids. Each image is another one, in the row's `data`.
    """
    import hashlib

    from transformers import AutoTokenizer

    from coldstill.storage_schema.rows import CachedRow, MediaReference, span_positions, spans_from_mask
    from tests.making import random_probs, targets_of

    rng, tokenizer, rows = np.random.default_rng(seed), AutoTokenizer.from_pretrained(folder), []
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    for number, count in enumerate(counts):
        before = "".join("<image>" if image % 2 else f"See {image}: <image>" for image in range(count))
        answer = f"It is {rng.integers(1000)}." + " Yes." * (number % 4)
        parts = [f"<s>user:{before} What is {number}?<end_of_utterance><s>assistant:", f"{answer}<end_of_utterance>"]
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
        tokens = np.concatenate(ids).astype(np.int32)
        spans = spans_from_mask(np.arange(tokens.size) >= len(ids[0]))
        positions = span_positions(spans)
        probs = random_probs(rng, positions.size, len(tokenizer))
        places = np.flatnonzero(tokens == placeholder).tolist()
        contents = [image_bytes(1000 * seed + 10 * number + image, size=size) for image in range(count)]
        rows.append(
            CachedRow(
                sample_id=f"row-{number}",
                token_ids=tokens,
                target_spans=spans,
                targets=targets_of(probs, tokens[positions + 1], top_k=top_k, draws=draws, seed=number),
                metadata={},
                media=tuple(
                    MediaReference(position=place, type="image/png", sha256=hashlib.sha256(data).hexdigest(), data=data)
                    for place, data in zip(places, contents, strict=True)
                ),
            )
        )
    return rows


def vision_dataset(
    root: Path, shards: list[list[Any]], *, tokenizer: Path, in_row_bytes: int = 1 << 30, sees: bool = True
) -> Path:
    """A sealed dataset of such rows. Media of more than `in_row_bytes` are files. `sees`: the header says that its
    teacher saw images."""
    from dataclasses import replace

    from coldstill.storage_schema.commits import commit_unit
    from coldstill.storage_schema.header_facts import ProcessorFacts
    from coldstill.storage_schema.manifest import seal
    from tests.making import begin_dataset, tiny_header

    placeholder = vision_tokenizer().convert_tokens_to_ids("<image>")
    facts = ProcessorFacts(name="P", settings_sha256="0" * 64, settings={"image_token_id": placeholder})
    about = {"license": "CC0-1.0", "processor": facts, "media_in_row_bytes": in_row_bytes} if sees else {}
    header = tiny_header(tokenizer, max_length=512, about=about)
    store = begin_dataset(root, header, tokenizer, [len(rows) for rows in shards])
    for unit, rows in enumerate(shards):
        stored = []
        for row in rows:
            media = []
            for item in row.media:
                if len(item.data) > in_row_bytes:
                    path = f"media/{item.sha256}.png"
                    store.put(path, item.data)
                    item = replace(item, path=path, data=None)
                media.append(item)
            stored.append(replace(row, media=tuple(media)))
        commit_unit(store, unit, rows=stored, rejects=[], header=header, environment={})
    seal(store)
    return root
