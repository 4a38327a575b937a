"""A language model that trains on real text in minutes on one core, and its tokenizer.

It has two transformer layers over token embeddings and hashed embeddings of the last two and three tokens, which matter
most. A full softmax over 32,000 ids would take most of the time. Training therefore estimates its normalizer from the
ids of the batch and a uniform sample of the others, each weighted by one over its inclusion probability
(Horvitz-Thompson).

Shape letters: `B` rows, `T` tokens, `V` vocabulary, `H` width, `C` candidate ids of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 32_000
CONTEXT = 512
WIDTH = 192
HEADS = 6
LAYERS = 2
HASH_ROWS = 1 << 17
ROWS_PER_STEP = 4
SAMPLED_IDS = 2048
LEARNING_RATE = 2e-3
TABLE_LEARNING_RATE = 1.2e-2


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE of `VOCABULARY` ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.project = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        rows, tokens, _ = hidden.shape
        parts = self.project(self.norms[0](hidden)).view(rows, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind()
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(rows, tokens, WIDTH))
        return hidden + self.feed_forward(self.norms[1](hidden))


class SmallLanguageModel(nn.Module):
    """`forward` returns hidden states. Logits are `hidden @ head.weight.T`; the last column of the head is the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, sparse=True)
        self.hashed = nn.Embedding(2 * HASH_ROWS, WIDTH, sparse=True)
        self.head = nn.Embedding(VOCABULARY, WIDTH + 1, sparse=True)
        self.places = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        for table in (self.tokens, self.hashed, self.head):
            nn.init.normal_(table.weight, std=0.05)
        nn.init.zeros_(self.hashed.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states `[B, T, H + 1]` of `ids int64 [B, T]`; the last column is 1, for the bias."""
        before = nn.functional.pad(ids, (2, 0))
        pair = ids * 1_000_003 + before[:, 1:-1] * 998_244_353
        triple = pair + before[:, :-2] * 777_767_777 + 12_345
        slots = torch.stack([_scramble(pair), _scramble(triple) + HASH_ROWS])
        hidden = self.tokens(ids) + self.hashed(slots).sum(0) + self.places[: ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.pad(self.norm(hidden), (0, 1), value=1.0)


def train(model: SmallLanguageModel, ids: Tensor, *, seed: int = 0) -> None:
    """Train for one pass over `ids int64 [N, T + 1]`, in random order."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.bincount(ids.flatten(), minlength=VOCABULARY).double() / ids.numel()
    with torch.no_grad():
        model.head.weight[:, -1] = torch.log(share + 0.1 / ids.numel()) - math.log(1 / VOCABULARY)
    tables = [model.tokens.weight, model.hashed.weight, model.head.weight]
    others = [
        parameter for name, parameter in model.named_parameters() if not name.startswith(("tokens", "hash", "hea"))
    ]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.SparseAdam(tables, betas=(0.9, 0.99)), TABLE_LEARNING_RATE),
        (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01), LEARNING_RATE),
    ]
    batches = torch.randperm(len(ids), generator=generator).split(ROWS_PER_STEP)
    for step, batch in enumerate(tqdm(batches, desc="small language model", unit="step")):
        for optimizer, rate in optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 30) * _cosine(step / len(batches))
        rows = ids[batch]
        loss = sampled_loss(model, rows, share=share, generator=generator)
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()


def sampled_loss(model: SmallLanguageModel, rows: Tensor, *, share: Tensor, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy of `rows int64 [B, T + 1]` with an estimated normalizer. `share [V]`: unigram frequencies."""
    labels = rows[:, 1:].reshape(-1)
    taken = torch.zeros(VOCABULARY, dtype=torch.bool)
    taken[labels] = True
    taken[torch.randperm(VOCABULARY, generator=generator)[:SAMPLED_IDS]] = True
    candidates = taken.nonzero()[:, 0]
    chance = 1 - (1 - share[candidates]) ** len(labels) * (1 - SAMPLED_IDS / VOCABULARY)
    hidden = model(rows[:, :-1]).reshape(len(labels), -1)
    logits = hidden @ model.head(candidates).T
    own = (torch.cumsum(taken, 0) - 1)[labels]
    label_logits = logits.gather(1, own[:, None])
    # A label is always included, so its weight is 1.
    logits = (logits - torch.log(chance).float()).scatter(1, own[:, None], label_logits)
    return nn.functional.cross_entropy(logits, own)


def _cosine(progress: float) -> float:
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def _scramble(keys: Tensor) -> Tensor:
    mixed = (keys ^ (keys >> 17)) * 0x2545F491
    return (mixed ^ (mixed >> 23)).remainder(HASH_ROWS)
