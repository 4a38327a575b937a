"""Tiny random models of families that see images, each with its own processor on one tokenizer, made from their
configurations."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.processing_utils import ProcessorMixin

from coldstill.common.processor import ImageExpander, _placeholder
from coldstill.storage_schema.rows import CachedRow, MediaReference, span_positions, spans_from_mask
from tests import vision
from tests.making import random_probs, targets_of

SIDE = vision.SIDE
_TOKENS = {
    "image_token": "<image>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_MORE = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
_AYA = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_1", "TILE_GLOBAL")


def tokenizer_with(*names: str) -> Any:
    """A tokenizer with the tokens of all families, of which it names those in `names`, as theirs do."""
    tokenizer = vision.vision_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*_TOKENS.values(), *_MORE, *_AYA]})
    for name in names:
        setattr(tokenizer, name, _TOKENS[name])
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(_TOKENS[name]))
    return tokenizer


def pil(module: str, name: str, **settings: Any) -> Any:
    """An image processor that runs without torchvision."""
    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, f"{name}ImageProcessorPil")(**settings)


def _text(tokenizer: Any, kind: str = "llama", **changes: Any) -> dict[str, Any]:
    return {**vision._text_config(tokenizer, hidden=64, layers=2, context=1024), "model_type": kind, **changes}


def _clip(kind: str = "clip_vision_model", **changes: Any) -> dict[str, Any]:
    eyes = {"model_type": kind, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    eyes |= {"num_attention_heads": 1, "image_size": SIDE, "patch_size": 8}
    return {**eyes, **changes}


def _model(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def _square(side: int = SIDE) -> dict[str, int]:
    return {"height": side, "width": side}


def _llava() -> tuple[Any, Any]:
    tokenizer = tokenizer_with()
    image = tokenizer.convert_tokens_to_ids("<image>")
    settings = {"image_token_index": image, "vision_feature_select_strategy": "default", "vision_feature_layer": -1}
    model = _model("llava", text_config=_text(tokenizer), vision_config=_clip(), **settings)
    return model, vision.llava_processor(tokenizer)


def _idefics3() -> tuple[Any, Any]:
    tokenizer = tokenizer_with()
    image = tokenizer.convert_tokens_to_ids("<image>")
    eyes = {key: value for key, value in _clip().items() if key != "model_type"}
    model = _model("idefics3", text_config=_text(tokenizer), vision_config=eyes, scale_factor=2, image_token_id=image)
    return model, vision.idefics3_processor(tokenizer, splits=True)


def _llava_next() -> tuple[Any, Any]:
    tokenizer = tokenizer_with()
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    settings = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1}
    settings |= {"vision_feature_select_strategy": "default", "image_grid_pinpoints": pinpoints}
    model = _model("llava_next", text_config=_text(tokenizer), vision_config=_clip(), **settings)
    images = pil(
        "llava_next", "LlavaNext", size={"shortest_edge": SIDE}, crop_size=_square(), image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return model, processor


def _llava_onevision() -> tuple[Any, Any]:
    tokenizer = tokenizer_with()
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    settings = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1}
    settings |= {"vision_feature_select_strategy": "full", "image_grid_pinpoints": pinpoints}
    settings |= {"video_token_index": tokenizer.convert_tokens_to_ids("<video>")}
    model = _model(
        "llava_onevision", text_config=_text(tokenizer), vision_config=_clip("siglip_vision_model"), **settings
    )
    images = pil("llava_onevision", "LlavaOnevision", size=_square(), image_grid_pinpoints=pinpoints)
    processor = transformers.LlavaOnevisionProcessor(
        images, tokenizer, None, num_image_tokens=16, vision_feature_select_strategy="full"
    )
    return model, processor


def _gemma3() -> tuple[Any, Any]:
    tokenizer = tokenizer_with("image_token", "boi_token", "eoi_token")
    text = _text(tokenizer, "gemma3_text", head_dim=32, sliding_window=32)
    model = _model(
        "gemma3",
        text_config=text,
        vision_config=_clip("siglip_vision_model"),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return model, transformers.Gemma3Processor(pil("gemma3", "Gemma3", size=_square()), tokenizer, image_seq_length=4)


def _paligemma() -> tuple[Any, Any]:
    tokenizer = tokenizer_with("image_token")
    images = pil("siglip", "Siglip", size=_square())
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    model = _model(
        "paligemma",
        text_config=_text(tokenizer, "gemma", head_dim=32),
        vision_config=_clip("siglip_vision_model"),
        projection_dim=64,
        image_token_index=tokenizer.image_token_id,
    )
    return model, processor


def _idefics2() -> tuple[Any, Any]:
    tokenizer = tokenizer_with()
    image = tokenizer.convert_tokens_to_ids("<image>")
    eyes = {key: value for key, value in _clip().items() if key != "model_type"}
    heads = {"resampler_n_heads": 2, "resampler_head_dim": 16, "num_key_value_heads": 1, "hidden_size": 64}
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, **heads}
    model = _model(
        "idefics2",
        text_config=_text(tokenizer, "mistral"),
        vision_config=eyes,
        perceiver_config=perceiver,
        image_token_id=image,
    )
    images = pil("idefics2", "Idefics2", size={"shortest_edge": 16, "longest_edge": SIDE}, do_image_splitting=False)
    return model, transformers.Idefics2Processor(images, tokenizer, image_seq_len=4)


def _qwen(kind: str) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        tokenizer = tokenizer_with()
        ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
        ids |= {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
        rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
        text = _text(tokenizer, f"{kind}_text", rope_parameters=rope)
        eyes = {"depth": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
        if kind == "qwen2_vl":
            eyes |= {"embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        else:
            eyes |= {"hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
        if kind == "qwen2_5_vl":
            eyes |= {"window_size": 32, "fullatt_block_indexes": [1]}
        if kind == "qwen3_vl":
            text |= {"head_dim": 32}
            eyes |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        model = _model(
            kind,
            text_config=text,
            vision_config=eyes,
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=ids["vision_end"],
        )
        sizes = {"shortest_edge": SIDE * SIDE, "longest_edge": 4 * SIDE * SIDE}
        images = pil("qwen2_vl", "Qwen2VL", patch_size=8, merge_size=2, temporal_patch_size=2, size=sizes)
        classes = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
        return model, getattr(transformers, f"{classes[kind]}Processor")(images, tokenizer, None)

    return make


def _internvl() -> tuple[Any, Any]:
    tokenizer = tokenizer_with("start_image_token", "end_image_token", "context_image_token", "video_token")
    eyes = _clip("internvl_vision", image_size=[SIDE, SIDE], patch_size=[8, 8])
    context = tokenizer.context_image_token_id
    model = _model("internvl", text_config=_text(tokenizer, "qwen2"), vision_config=eyes, image_token_id=context)
    images = pil("got_ocr2", "GotOcr2", size=_square(), crop_to_patches=True, min_patches=1, max_patches=4)
    return model, transformers.InternVLProcessor(images, tokenizer, None, image_seq_length=4)


def _aya_vision() -> tuple[Any, Any]:
    tokenizer = tokenizer_with()
    model = _model(
        "aya_vision",
        text_config=_text(tokenizer, "cohere2"),
        vision_config=_clip("siglip_vision_model"),
        downsample_factor=2,
        alignment_intermediate_size=128,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    images = pil("got_ocr2", "GotOcr2", size=_square(), crop_to_patches=True, min_patches=1, max_patches=4)
    processor = transformers.AyaVisionProcessor(images, tokenizer, patch_size=8, img_size=SIDE, downsample_factor=2)
    return model, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "Idefics3, SmolVLM": _idefics3,
    "LLaVA": _llava,
    "LLaVA-NeXT": _llava_next,
    "LLaVA-OneVision": _llava_onevision,
    "Idefics2": _idefics2,
    "Gemma 3": _gemma3,
    "PaliGemma": _paligemma,
    "Qwen2-VL": _qwen("qwen2_vl"),
    "Qwen2.5-VL": _qwen("qwen2_5_vl"),
    "Qwen3-VL": _qwen("qwen3_vl"),
    "InternVL (hf)": _internvl,
    "Aya Vision": _aya_vision,
}

NEEDS_TORCHVISION = {"LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "InternVL (hf)"}
"""Their processors are loaded with a video part, which needs torchvision. It is left out here."""
ONLY_BUILT = {
    "Mistral 3": "its processor needs torchvision",
    "SmolVLM, SmolVLM2": "its processor needs torchvision and num2words; it is Idefics3's",
    "LFM2-VL": "its image processor needs torchvision",
}


def build(family: str) -> tuple[Any, Any]:
    """A random model of `family` in evaluation mode, and its processor, whose video part is left out."""
    check = ProcessorMixin.check_argument_for_proper_class
    ProcessorMixin.check_argument_for_proper_class = lambda self, name, part: (
        type(part) if part is None else check(self, name, part)
    )
    try:
        return FAMILIES[family]()
    finally:
        ProcessorMixin.check_argument_for_proper_class = check


def rows_of(processor: Any, counts: Sequence[int]) -> list[CachedRow]:
    """Rows with `counts` images each, in the family's own placeholders, and a random teacher on the answers."""
    rng, rows, tokenizer = np.random.default_rng(0), [], processor.tokenizer
    placeholder = ImageExpander(processor).placeholder_id
    for number, count in enumerate(counts):
        question = f"<s>user:{'And this: '.join([_placeholder(processor)] * count)} What is it?<end_of_utterance>"
        parts = [question + "<s>assistant:", f"It is {number}. Yes.<end_of_utterance>"]
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
        tokens = np.concatenate(ids).astype(np.int32)
        spans = spans_from_mask(np.arange(tokens.size) >= len(ids[0]))
        positions = span_positions(spans)
        probs = random_probs(rng, positions.size, len(tokenizer))
        contents = [vision.image_bytes(10 * number + image, size=(70 - 20 * image, 40)) for image in range(count)]
        rows.append(
            CachedRow(
                sample_id=f"row-{number}",
                token_ids=tokens,
                target_spans=spans,
                targets=targets_of(probs, tokens[positions + 1], top_k=8),
                media=tuple(
                    MediaReference(
                        position=int(at), type="image/png", sha256=hashlib.sha256(data).hexdigest(), data=data
                    )
                    for at, data in zip(np.flatnonzero(tokens == placeholder), contents, strict=True)
                ),
            )
        )
    return rows
