"""The demo's tokenizer, teacher and student, trained on the teacher's part of the text.

`python -m coldstill.demo.models {teacher|student} OUTPUT [--quick]` trains one model in its own process. The teacher's
stage also trains the tokenizer. Results are folders that transformers and vLLM load. Both models read the same text in
different orders: whole files first, then pairs in their chat form. The student reads less of it.

The tokenizer is a byte-level BPE of 8,192 entries, so it can encode any text. Its chat template marks the assistant's
tokens (`{% generation %}`), so one call returns both token ids and loss mask.

A model is trained on token blocks, with checkpoints from which a killed run resumes.

Shape letters: `N` blocks, `B` blocks of a step, `T` tokens of a block (`MAX_TOKENS`), `V` vocabulary.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from coldstill.common.files import new_file, new_folder
from coldstill.common.progress import tqdm

from .settings import MAX_TOKENS, STUDENT, TEACHER, Layout, Shape, size_of
from .text import read_rows

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 8_192

BEGIN, END, USER, ASSISTANT = SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")

WORD_PATTERN = r"\n[ ]*| ?_*[A-Za-z]+|_+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_]+|\s+"
"""Splits code before the merges: a line break keeps its indentation, a name is split before its underscores."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}\n"
    "{% else %}"
    "<|user|>\n{{ message['content'] }}\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The answer is enclosed in two special tokens. A line break before it would merge with its indentation, and no mask
can mark a token that is half the template's and half the assistant's."""

RAW_SHARE = 0.25
"""Share of the training tokens that come from whole files, read first. The rest come from pairs, as in the capture."""

BLOCKS_PER_STEP = 2
"""B. Fewer tokens per step reach a lower loss from the same text, measured with blocks of 512 tokens. After 510,000
tokens: 4.46 nats with B = 4, 4.78 with B = 8. After 200,000: 4.90 with B = 2, 5.07 with B = 4 (AdamW at 0.01)."""

MATRIX_RATE, OTHER_RATE = 0.02, 5e-3
"""Peak learning rates: Muon for matrices, AdamW for embeddings and norms."""

WARMUP_STEPS = 20

SECONDS_BETWEEN_CHECKPOINTS = 15.0


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Learn the merges from `texts`. The same texts give the same tokenizer."""
    return byte_level_tokenizer(
        texts,
        vocabulary=vocabulary,
        pattern=WORD_PATTERN,
        special_tokens=SPECIAL_TOKENS,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
    )


def byte_level_tokenizer(
    texts: Iterable[str], *, vocabulary: int, pattern: str, special_tokens: Sequence[str], **settings: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `texts`, which `pattern` splits into words. `settings`: of the tokenizer's class."""
    # The library reads this at its first use. Without it every later fork prints a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **settings)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer saved in `folder`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def new_model(shape: Shape, *, vocabulary: int) -> LlamaForCausalLM:
    """A Llama with random weights and tied embeddings, which are most of a model this small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(shape.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.width // shape.heads,
            intermediate_size=shape.feed_forward,
            # vLLM needs room for one token after the row.
            max_position_embeddings=2 * MAX_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def parameter_count(model: Any) -> int:
    """Number of parameters; a tied head is counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_blocks(
    layout: Layout, tokenizer: PreTrainedTokenizerFast, *, tokens: int, seed: int, raw_share: float = RAW_SHARE
) -> torch.Tensor:
    """`int64 [N, T]`, about `tokens` in total: whole files of the teacher's part, then its pairs."""
    files = [row["text"] for row in read_rows(layout.rows("teacher", "raw"))]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    raw = pack([[begin, *ids, end] for ids in tokenizer(files)["input_ids"]], block=MAX_TOKENS, seed=seed)
    chats = [row["messages"] for row in read_rows(layout.rows("teacher", "pairs"))]
    encoded = tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True)["input_ids"]
    blocks = tokens // MAX_TOKENS
    raw = raw[: int(blocks * raw_share)]
    pairs = pack(encoded, block=MAX_TOKENS, seed=seed + 1)[: blocks - len(raw)]
    return torch.cat([raw, pairs])


def pack(documents: Sequence[Sequence[int]], *, block: int, seed: int) -> torch.Tensor:
    """`int64 [N, T = block]`: documents joined in random order and cut into blocks. A partial last block is dropped."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    stream = torch.tensor([token for index in order for token in documents[index]])
    blocks = stream.numel() // block
    return stream[: blocks * block].view(blocks, block)


def pretrain(model: Any, blocks: torch.Tensor, *, checkpoint: Path, label: str) -> float:
    """Train a transformers causal LM for one pass over `blocks int64 [N, T]`; return the mean loss of the last steps.

    The loss is cross-entropy in nats per token. The caller removes `checkpoint`.
    """

    def loss_of(step: int) -> torch.Tensor:
        return _loss(model, blocks[step * BLOCKS_PER_STEP : (step + 1) * BLOCKS_PER_STEP])

    rates = MATRIX_RATE, OTHER_RATE
    steps = len(blocks) // BLOCKS_PER_STEP
    return train_steps(model, loss_of, steps=steps, rates=rates, checkpoint=checkpoint, label=label)


def train_steps(
    model: Any,
    loss_of: Callable[[int], torch.Tensor],
    *,
    steps: int,
    rates: tuple[float, float],
    checkpoint: Path,
    label: str,
) -> float:
    """Take `steps` optimizer steps, step n on the loss `loss_of(n)`; return the mean loss of the last ones.

    Muon updates the matrices inside the model and AdamW everything else, at the peak `rates`: with this few steps that
    is better than AdamW alone. Both rates fall linearly to 0. The caller removes `checkpoint`.
    """
    optimizers = _optimizers(model, *rates)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first, losses = _resume(checkpoint, model, optimizers)
    saved = time.monotonic()
    model.train()
    with tqdm(total=steps, initial=first, desc=label, unit="step") as bar:
        for step in range(first, steps):
            share = min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                for group, rate in zip(optimizer.param_groups, peak, strict=True):
                    group["lr"] = rate * share
            loss = loss_of(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses = [*losses[-19:], loss.item()]
            bar.set_postfix_str(f"loss {sum(losses) / len(losses):.2f}", refresh=False)
            bar.update()
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                _save(checkpoint, model, optimizers, step + 1, losses)
                saved = time.monotonic()
    return sum(losses) / max(1, len(losses))


def _loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of `tokens int64 [B, T]`, each given the tokens before it."""
    hidden = model.model(tokens).last_hidden_state[:, :-1]
    return functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


class _Muon(torch.optim.Muon):
    """torch's Muon, with its products in float32 instead of bfloat16.

    On AVX2 alone a step of the teacher takes 0.5 s in float32 and 9 s in bfloat16, at the same loss.
    Arguments and state are torch's own.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices by their gradients. `closure` is not used."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = _orthogonalize(matrix.grad.lerp(average, group["momentum"]), group)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])))


def _orthogonalize(matrix: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """`matrix` with all singular values near 1, by the Newton-Schulz iteration of torch's Muon."""
    a, b, c = group["ns_coefficients"]
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    wide = wide / wide.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide


def _optimizers(model: Any, matrix_rate: float, other_rate: float) -> list[torch.optim.Optimizer]:
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inside else others).append(parameter)
    return [
        _Muon(matrices, lr=matrix_rate, weight_decay=0.1),
        torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _save(path: Path, model: Any, optimizers: list[torch.optim.Optimizer], step: int, losses: list[float]) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    with new_file(path) as beside:
        torch.save({"step": step, "losses": losses, "model": model.state_dict(), "optimizers": states}, beside)


def _resume(path: Path, model: Any, optimizers: list[torch.optim.Optimizer]) -> tuple[int, list[float]]:
    """Load the checkpoint, if it exists. Return the number of finished steps and the last losses."""
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["losses"]


def make_tokenizer(layout: Layout) -> None:
    """Train and save the tokenizer, unless its folder exists."""
    if not layout.tokenizer.exists():
        tokenizer = train_tokenizer(row["text"] for row in read_rows(layout.rows("teacher", "raw")))
        with new_folder(layout.tokenizer) as folder:
            tokenizer.save_pretrained(folder)


def make_model(layout: Layout, final: Path, shape: Shape, *, tokens: int) -> None:
    """Train a model of this shape and save it, with the tokenizer, as the folder `final`."""
    from transformers.utils import logging

    logging.disable_progress_bar()

    tokenizer = load_tokenizer(layout.tokenizer)
    model = new_model(shape, vocabulary=len(tokenizer))
    blocks = training_blocks(layout, tokenizer, tokens=tokens, seed=shape.seed)
    checkpoint = layout.root / f".{final.name}.checkpoint.pt"
    pretrain(model, blocks, checkpoint=checkpoint, label=f"{final.name}, {parameter_count(model) / 1e6:.1f} M")
    with new_folder(final) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    """Train the model named on the command line."""
    arguments = argparse.ArgumentParser(description="Train one model of the demo.")
    arguments.add_argument("model", choices=["teacher", "student"])
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()
    layout, size = Layout(options.output), size_of(quick=options.quick)
    make_tokenizer(layout)
    if options.model == "teacher":
        make_model(layout, layout.teacher, TEACHER, tokens=size.teacher_tokens)
    else:
        make_model(layout, layout.student, STUDENT, tokens=size.student_tokens)


if __name__ == "__main__":
    main()
