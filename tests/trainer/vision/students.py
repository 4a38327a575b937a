"""What the tests of students that see images share: loading, logits by transformers alone, configurations."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from coldstill.storage_schema.rows import CachedRow
from tests import vision
from tests.trainer.test_train import make_config


def loaded(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


def content(dataset: Path, item: Any) -> bytes:
    return item.data if item.data is not None else (dataset / item.path).read_bytes()


def own_logits(model: Any, folder: Path, row: CachedRow, dataset: Path) -> torch.Tensor:
    """`[N, V]` logits at a row's targets, by the processor's own output of the row's text. Answers are at the end."""
    processor = AutoProcessor.from_pretrained(folder)
    shown = [Image.open(io.BytesIO(content(dataset, item))).convert("RGB") for item in row.media]
    text = processor.tokenizer.decode(row.token_ids)
    inputs = processor(text=[text], images=[shown] if shown else None, return_tensors="pt", add_special_tokens=False)
    inputs = {name: value for name, value in inputs.items() if "offset" not in name}
    if not shown:
        assert inputs["input_ids"][0].tolist() == row.token_ids.tolist()
    logits = model(**inputs).logits[0]
    from_end = row.token_ids.size - row.positions
    return logits[logits.shape[0] - torch.from_numpy(from_end)]


def config_of(dataset: Path, folder: Path, output: Path, **changes: Any) -> Any:
    training = {"max_steps": 3, "learning_rate": 0.01, "batch_size": 4, "gradient_accumulation_steps": 1}
    training |= changes.pop("training", {})
    return make_config(dataset, folder, output, training=training, **changes)


def text_model(folder: Path) -> Path:
    """A random tiny Llama with the tokenizer of the students that see images."""
    tokenizer = vision.vision_tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
