"""Tiny teachers for the benchmarks of capture and of a step, and the rows that they score.

The body has two layers of width 128, so head, top K and log-sum-exp dominate the time.

Shape letters: `V` vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coldstill.common.files import new_folder
from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.header import Codec, DatasetHeader
from coldstill.storage_schema.header_facts import TeacherFacts

CONTEXT = 512


def tiny_teacher(cache: Path, *, vocabulary: int) -> Path:
    """Folder of a Llama with random weights, created once."""
    folder = cache / f"tiny_teacher_{vocabulary}"
    if not folder.exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                intermediate_size=256,
                max_position_embeddings=2 * CONTEXT,
                tie_word_embeddings=False,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
        # Random weights of this size give nearly flat distributions; real teachers are sharper.
        model.lm_head.weight.data.mul_(12)
        with new_folder(folder) as beside:
            model.save_pretrained(beside)
    return folder


def units_of_rows(
    *, vocabulary: int, units: int, rows: int, tokens: int, target_share: float
) -> list[list[TokenSequence]]:
    """Units of random rows. The last `target_share` of a row's positions are targets, like a chat's answer."""
    generator = np.random.default_rng(0)
    return [
        [
            TokenSequence(
                sample_id=f"{unit}-{row}",
                source_row=unit * rows + row,
                token_ids=generator.integers(0, vocabulary, tokens).astype(np.int32),
                target_spans=np.array([[tokens - 1 - round((tokens - 1) * target_share), tokens - 1]], np.int32),
            )
            for row in range(rows)
        ]
        for unit in range(units)
    ]


def header_of(
    *, vocabulary: int, top_k: int, draws: int = 0, tail: str = "exact", mode: str = "score"
) -> DatasetHeader:
    """The header of a capture of the tiny teacher."""
    return DatasetHeader.model_validate(
        {
            "teacher": TeacherFacts(name="tiny", weights_fingerprint="0", dtype="float32", head_dtype="float32"),
            "tokenizer_fingerprint": "0" * 64,
            "vocab_size": vocabulary,
            "token_count": vocabulary,
            "top_k": top_k,
            "min_prob": 1e-4,
            "draws": draws,
            "kept_draws": min(draws, 32),
            "draw_seed": 0,
            "codec": Codec.preset("fine", top_k=top_k),
            "tail": tail,
            "mode": mode,
            "loss_on": "all",
            "max_length": CONTEXT,
            "over_long": "reject",
            "rows_per_unit": 1,
            "source_sha256": "0" * 64,
        }
    )


def config_of(folder: Path, *, engine: str = "vllm", top_k: int, tap: str = "worker", seqs: int = 256) -> TeacherConfig:
    """Settings of the teacher in `folder`. vLLM gets a small key-value cache, because several engines run together."""
    arguments = {
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "num_gpu_blocks_override": 128,
        "max_num_seqs": seqs,
    }
    return TeacherConfig.model_validate(
        {
            "model": str(folder),
            "engine": engine,
            "tap": tap,
            "dtype": "float32",
            "top_k": top_k,
            "max_length": CONTEXT,
            "engine_args": arguments if engine == "vllm" else {},
        }
    )
