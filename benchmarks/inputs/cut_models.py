"""A teacher and students that keep some of its layers, as folders that transformers and vLLM load.

The real teacher is Gemma 3 270M (`real_model.py`). The toy has the same architecture with six layers and 2,048 ids and
learns in seconds, so that the whole benchmark can be run as a test.

A student that lacks layers talks nonsense. One that is healed has been trained on plain text since, without a teacher.

Shape letters: `N` blocks of text, `T` tokens of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from coldstill.common.files import new_folder
from coldstill.demo.text import read_rows

TOY_IDS, TOY_TOKENS, TOY_BLOCKS_PER_STEP, TOY_RATE = 2048, 96, 8, 3e-3
WARMUP_STEPS = 20


def kept_layers(kinds: Sequence[str], count: int) -> list[int]:
    """The `count` layers that a student keeps of a teacher whose layers are of these `kinds`.

    The first, the last and every `full_attention` one, then those nearest to either end, front and back in turns: of
    Gemma 3 270M, 8 layers so chosen are 10.6 nats from the teacher before training, 8 evenly spread ones 22.1 (at 189
    positions of the validation part).
    Raises `ValueError` if `count` is too small for these or larger than the teacher.
    """
    kept = {0, len(kinds) - 1} | {layer for layer, kind in enumerate(kinds) if kind == "full_attention"}
    if not len(kept) <= count <= len(kinds):
        raise ValueError(f"a student keeps {len(kept)} to {len(kinds)} layers of this teacher, not {count}")
    while len(kept) < count:
        free = [layer for layer in range(len(kinds)) if layer not in kept]
        kept.add(free[0] if free[0] <= len(kinds) - 1 - free[-1] else free[-1])
    return sorted(kept)


def write_student(teacher: Path, folder: Path, *, layers: int) -> None:
    """Write the student with `layers` of the teacher's layers into `folder`, with the teacher's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    of_teacher: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    kept = kept_layers(of_teacher.config.layer_types, layers)
    fields = of_teacher.config.to_dict()
    fields |= {"num_hidden_layers": layers, "layer_types": [of_teacher.config.layer_types[layer] for layer in kept]}
    student: Any = AutoModelForCausalLM.from_config(type(of_teacher.config).from_dict(fields), dtype=torch.float32)
    weights = {}
    for name, weight in of_teacher.state_dict().items():
        prefix, middle, rest = name.partition("model.layers.")
        if middle:
            layer, _, rest = rest.partition(".")
            if int(layer) not in kept:
                continue
            name = f"{prefix}{middle}{kept.index(int(layer))}.{rest}"
        weights[name] = weight
    student.load_state_dict(weights)
    with new_folder(folder) as beside:
        student.save_pretrained(beside)
        AutoTokenizer.from_pretrained(teacher).save_pretrained(beside)


def load_model(folder: Path) -> Any:
    """The model in `folder`, in float32 and for inference."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def toy_model(vocabulary: int) -> Any:
    """The toy with random weights, the same at each call."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma3ForCausalLM(config)


def make_toy(folder: Path, rows: Path, *, steps: int) -> None:
    """Train the toy teacher on the texts of the file `rows` and write it into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [row["text"] for row in read_rows(rows)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOY_IDS,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    model = toy_model(len(tokenizer))
    blocks = blocks_of(texts, tokenizer, tokens=TOY_TOKENS)
    train_on_text(model, blocks, steps=steps, blocks_per_step=TOY_BLOCKS_PER_STEP, rate=TOY_RATE, desc="toy teacher")
    with new_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def blocks_of(texts: Sequence[str], tokenizer: Any, *, tokens: int) -> torch.Tensor:
    """The texts one after the other, cut into blocks `[N, T]`; what is left of the last one is dropped."""
    ids = [id_ for text in texts for id_ in tokenizer(text)["input_ids"]]
    count = len(ids) // tokens
    return torch.tensor(ids[: count * tokens]).view(count, tokens)


def train_on_text(
    model: Any, blocks: torch.Tensor, *, steps: int, blocks_per_step: int, rate: float, desc: str
) -> None:
    """Train the weights that need a gradient on the next token of `blocks [N, T]`, each step on random ones."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in tqdm(range(steps), desc=desc, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
        of_step = blocks[torch.randperm(len(blocks), generator=generator)[:blocks_per_step]]
        model(of_step, labels=of_step).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
