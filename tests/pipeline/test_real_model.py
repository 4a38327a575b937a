"""A whole capture of a real model, Gemma 3 270M in float32, by real vLLM on real Ray. Needs 7 GB and a few minutes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.inputs import real_model
from coldstill.pipeline.capture import capture
from coldstill.pipeline.config import CaptureConfig
from coldstill.storage_schema.commits import read_commit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.rows import span_positions
from coldstill.storage_schema.store import Store
from coldstill.tools.verify import verify
from tests import making

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not real_model.is_installed(), reason="no package with a real model is installed"),
]

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It is a sentence that holds every letter of the alphabet.",
    "Permission is hereby granted, free of charge, to any person obtaining a copy, to deal in it without restriction.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Water boils at 100 degrees Celsius at sea level, and at a lower temperature on a mountain.",
    "In 1969, two people walked on the Moon for the first time, and a third one waited in orbit.",
    "你好，世界。 Bonjour le monde. Hola, mundo. Привет, мир.",
]


def test_a_real_float32_teacher_is_captured_and_gives_what_transformers_gives(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = real_model.model_folder()
    config = CaptureConfig.model_validate(
        {
            "output": str(tmp_path / "dataset"),
            "mode": "pretrain",
            "source": {
                "path": str(making.write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])),
            },
            "teacher": {
                "model": str(folder),
                "engine": "vllm",
                "dtype": "float32",
                "top_k": 8,
                "draws": 8,
                "max_length": 128,
                "engine_args": {"enforce_eager": True},
            },
            "rows_per_unit": 3,
        }
    )
    capture(config)
    assert verify(config.output, deep=True, progress=False) == []
    facts = read_commit(Store(config.output), 0).environment
    with capfd.disabled():
        print({name: facts[name] for name in facts if name.startswith("canary")}, file=sys.stderr)
    assert facts["canary_kl"] <= facts["canary_kl_limit"] < 1e-5

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = list(open_dataset(config.output).rows())
    texts = [tokenizer.decode(row.token_ids, skip_special_tokens=True) for row in rows]
    assert "".join(texts) == "".join(TEXTS)
    losses = []
    for row in rows:
        positions, tokens = span_positions(row.target_spans), torch.from_numpy(row.token_ids).long()
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(tokens[None]).logits[0].double(), -1).numpy()
        wanted = logprobs[positions, row.token_ids[positions + 1]]
        np.testing.assert_allclose(row.targets.label_logprob, wanted, atol=2e-2, rtol=2e-3)  # as stored
        assert (row.targets.by_probability().ids[:, 0] == logprobs[positions].argmax(1)).mean() > 0.98
        losses.append(-wanted)
    assert np.concatenate(losses).mean() < 4  # with <bos>, which this model cannot do without
