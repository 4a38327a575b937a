"""Small parts that tests are built from: random teachers, rows, sealed datasets, tokenizers and models. All real."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.header import Codec, DatasetHeader
from coldstill.storage_schema.header_facts import TeacherFacts
from coldstill.storage_schema.manifest import Manifest, seal
from coldstill.storage_schema.plan import PLAN_NAME, Unit, plan_to_bytes
from coldstill.storage_schema.rows import LOG_FLOOR, CachedRow, TeacherTargets, span_positions, spans_from_mask
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER, fingerprint

if TYPE_CHECKING:
    import pytest

VOCABULARY = 64

SMALL_ENGINE: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
"""`engine_args` of vLLM in tests. An engine lives as long as its process, and a process of the tests holds a dozen."""


def targets_of(
    probs: np.ndarray,
    labels: np.ndarray,
    *,
    top_k: int,
    min_prob: float = 0.0,
    draws: int = 0,
    seed: int = 0,
    draw_logprobs: bool = False,
) -> TeacherTargets:
    """The targets of dense teacher distributions `probs float64 [N, V]`, by the plainest code there is."""
    rng = np.random.default_rng(seed)
    positions, vocabulary = probs.shape
    ids = np.argsort(-probs, axis=1, kind="stable")[:, :top_k]
    counts = np.maximum(1, (np.take_along_axis(probs, ids, 1) >= min_prob).sum(1)).astype(np.int32)
    kept = np.arange(top_k) < counts[:, None]
    log_tail, draw_ids, draw_counts = [], [], []
    for n in range(positions):
        kept_here = set(ids[n, : counts[n]].tolist())
        tail = [v for v in range(vocabulary) if v not in kept_here]
        log_tail.append(max(np.log(probs[n, tail].sum()), LOG_FLOOR) if tail else LOG_FLOOR)
        drawn = rng.choice(vocabulary, size=draws, p=probs[n])
        outside = [v for v in drawn if v not in kept_here]
        draw_ids.extend(outside)
        draw_counts.append(len(outside))
    owner = np.repeat(np.arange(positions), np.array(draw_counts, int))
    return TeacherTargets(
        ids=np.where(kept, ids, ids[:, :1]).astype(np.int32),
        logprobs=np.where(kept, np.log(np.take_along_axis(probs, ids, 1)), -np.inf).astype(np.float32),
        counts=counts,
        log_tail=np.array(log_tail, np.float32),
        label_logprob=np.log(probs[np.arange(positions), labels]).astype(np.float32),
        draw_ids=np.array(draw_ids, np.int32),
        draw_counts=np.array(draw_counts, np.int32),
        draw_logprobs=np.log(probs[owner, np.array(draw_ids, int)]).astype(np.float32) if draw_logprobs else None,
    )


def wide_targets(
    rng: np.random.Generator,
    counts: np.ndarray,
    *,
    vocabulary: int,
    top_k: int,
    most_draws: int = 0,
    sharpness: float = 4.0,
) -> TeacherTargets:
    """Targets with `counts [N]` kept entries over a large vocabulary, whose dense distributions are never made."""
    parts = []
    for count in counts.tolist():
        ids = rng.choice(vocabulary, top_k, replace=False)
        tail = 0.1 if count < vocabulary else 0.0
        probs = (1 - tail) * random_probs(rng, 1, count, sharpness=sharpness)[0]
        draws = rng.integers(0, most_draws + 1) if tail else 0
        outside = rng.integers(0, vocabulary, 4 * draws + 8)
        outside = outside[~np.isin(outside, ids[:count])][:draws]
        parts.append((ids, probs, tail, outside))
    counts = counts.astype(np.int32)
    kept = np.arange(top_k) < counts[:, None]
    logprobs = np.full((counts.size, top_k), -np.inf, np.float32)
    logprobs[kept] = np.log(np.concatenate([probs for _, probs, _, _ in parts]))
    ids = np.stack([ids for ids, _, _, _ in parts]).astype(np.int32)
    return TeacherTargets(
        ids=np.where(kept, ids, ids[:, :1]),
        logprobs=logprobs,
        counts=counts,
        log_tail=np.array([np.log(tail) if tail else LOG_FLOOR for _, _, tail, _ in parts], np.float32),
        label_logprob=np.full(counts.size, LOG_FLOOR, np.float32),
        draw_ids=np.concatenate([draws for _, _, _, draws in parts]).astype(np.int32),
        draw_counts=np.array([draws.size for _, _, _, draws in parts], np.int32),
    )


def random_probs(rng: np.random.Generator, positions: int, vocabulary: int, *, sharpness: float = 2.0) -> np.ndarray:
    """`float64 [N, V]` distributions of random logits."""
    logits = sharpness * rng.standard_normal((positions, vocabulary))
    probs = np.exp(logits - logits.max(1, keepdims=True))
    return probs / probs.sum(1, keepdims=True)


def random_row(
    rng: np.random.Generator, sample_id: str, *, top_k: int = 8, draws: int = 4, length: int | None = None
) -> CachedRow:
    """A row of random tokens, a random loss mask and a random teacher."""
    tokens = rng.integers(0, VOCABULARY, length or int(rng.integers(4, 24)), dtype=np.int32)
    loss_mask = rng.random(tokens.size) < 0.6
    loss_mask[-1] = True
    spans = spans_from_mask(loss_mask)
    positions = span_positions(spans)
    probs = random_probs(rng, positions.size, VOCABULARY)
    targets = targets_of(probs, tokens[positions + 1], top_k=top_k, draws=draws, seed=int(rng.integers(1 << 30)))
    return CachedRow(
        sample_id=sample_id, token_ids=tokens, target_spans=spans, targets=targets, metadata={"n": sample_id}
    )


def random_rows(count: int, *, seed: int = 0) -> list[CachedRow]:
    """Random rows, `row-0` and so on."""
    rng = np.random.default_rng(seed)
    return [random_row(rng, f"row-{number}") for number in range(count)]


def tiny_tokenizer(folder: Path, *, vocabulary: int = VOCABULARY) -> Path:
    """A byte-level `tokenizer.json` with `vocabulary` ids, loadable by transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *(chr(ord("!") + i) for i in range(vocabulary - 2))]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def tiny_header(tokenizer: Path, *, top_k: int = 8, draws: int = 4, **changes: object) -> DatasetHeader:
    """A header for rows of `random_row`."""
    facts = fingerprint(tokenizer)
    fields = {
        "teacher": TeacherFacts(name="tiny", weights_fingerprint="0" * 64, dtype="float32", head_dtype="float32"),
        "tokenizer_fingerprint": facts.fingerprint,
        "vocab_size": facts.token_count,
        "token_count": facts.token_count,
        "top_k": top_k,
        "min_prob": 0.0,
        "draws": draws,
        "kept_draws": draws,
        "codec": Codec.preset("fine", top_k=top_k),
        "draw_seed": 0,
        "tail": "exact",
        "loss_on": "assistant",
        "max_length": 64,
        "over_long": "reject",
        "rows_per_unit": 8,
        "source_sha256": "0" * 64,
        "about": {"license": "CC0-1.0"},
    }
    return DatasetHeader.model_validate({**fields, **changes})


def begin_dataset(root: Path | str, header: DatasetHeader, tokenizer: Path, units: list[int]) -> Store:
    """A dataset directory before its first commit: header, tokenizer files and a plan with `units` rows each."""
    store = Store(root)
    store.create("dataset.json", header.to_bytes())
    store.put(f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}", (tokenizer / TOKENIZER_FILE).read_bytes())
    starts = np.cumsum([0, *units])
    plan = [Unit(i, int(starts[i]), int(starts[i]), rows) for i, rows in enumerate(units)]
    store.create(PLAN_NAME, plan_to_bytes(plan))
    return store


def write_dataset(
    root: Path | str, shards: list[list[CachedRow]], *, header: DatasetHeader, tokenizer: Path
) -> Manifest:
    """A sealed dataset with one shard per list of rows, through the real commit protocol."""
    store = begin_dataset(root, header, tokenizer, [len(rows) for rows in shards])
    for unit, rows in enumerate(shards):
        commit_unit(store, unit, rows=rows, rejects=[], header=header, environment={})
    return seal(store)


def tiny_llama(folder: Path, *, vocabulary: int = VOCABULARY, seed: int = 0, **changes: int) -> Path:
    """A random 2-layer Llama with the tiny tokenizer beside its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).save_pretrained(folder)
    tiny_tokenizer(folder, vocabulary=min(vocabulary, VOCABULARY))
    return folder


def in_hub_cache(folder: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a copy of the model in `folder` into a cache of the Hub, as a download of `name` does; its commit.

    Until the test ends, the Hub's libraries read this cache, and have no network.
    """
    import huggingface_hub

    commit = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return commit


CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}:{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}</s>{% endgeneration %}{% else %}{{ message['content'] }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def chat_model(
    folder: Path, *, template: str | None = CHAT_TEMPLATE, seed: int = 0, padding: int = 6, context: int = 512
) -> Path:
    """A random 2-layer Llama whose byte-level tokenizer has a chat template; its head has `padding` rows too many."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tiny_llama(folder, vocabulary=len(tokens) + padding, seed=seed, max_position_embeddings=context)
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def misnamed_tokenizer(folder: Path) -> Path:
    """A `chat_model` whose tokenizer is byte-level, and whose `tokenizer_config.json` names Llama's class."""
    chat_model(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}))
    return folder


def chat_rows(count: int) -> list[object]:
    """Short chats of different lengths with one assistant turn each."""
    return [
        {
            "id": f"chat-{i}",
            "topic": i % 3,
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i * i}?"},
                {"role": "assistant", "content": f"It is {i + i * i}." + " Yes." * (i % 7)},
            ],
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    """One JSON document per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lora_adapter(folder: Path, model: Path, *, seed: int = 0, scale: float = 0.3, **settings: object) -> Path:
    """A random LoRA adapter of `model`, whose deltas are not zero, as peft saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    wanted: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        **settings,
    }
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **wanted))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight.add_(scale * torch.randn_like(weight) / max(weight.shape) ** 0.5)
            assert "lora_" not in name or weight.abs().sum() > 0
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
