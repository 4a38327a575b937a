"""The demo's tokenizer and models: the loss mask, the sizes, and a killed training run that resumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coldstill.demo import models
from coldstill.demo.models import (
    END,
    SPECIAL_TOKENS,
    VOCABULARY,
    load_tokenizer,
    new_model,
    pack,
    parameter_count,
    pretrain,
    train_tokenizer,
)
from coldstill.demo.settings import MAX_TOKENS, STUDENT, TEACHER, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TINY = Shape(width=32, layers=1, heads=1, feed_forward=32, seed=3)

CHAT = [
    {"role": "user", "content": 'def twice(x):\n    """Both of it."""'},
    {"role": "assistant", "content": "result = x + x  # \u00fcber\nreturn result"},
    {"role": "user", "content": "def once(x):"},
    {"role": "assistant", "content": "    return x"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [Path(models.__file__).read_text(), Path(__file__).read_text()]
    return train_tokenizer(texts, vocabulary=600)


def test_the_template_marks_exactly_the_assistants_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    runs: list[list[int]] = [[]]
    for token, marked in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if marked:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    answers = [message["content"] + END for message in CHAT if message["role"] == "assistant"]
    assert [tokenizer.decode(run) for run in runs if run] == answers


def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("def f(x):\n\t return  x\n\n\n    # \u00e9\u4e2d\U0001f642\r\n", "__init__ _a1 12345 ...", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_same_text_gives_the_same_tokenizer_and_a_folder_keeps_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    texts = [Path(models.__file__).read_text(), Path(__file__).read_text()]
    again = train_tokenizer(texts, vocabulary=600)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]


def test_the_student_is_at_least_four_times_smaller() -> None:
    teacher, student = (parameter_count(new_model(shape, vocabulary=VOCABULARY)) for shape in (TEACHER, STUDENT))
    assert teacher >= 4 * student


@pytest.mark.parametrize("shape", [TEACHER, STUDENT])
def test_vllm_can_serve_the_shape(shape: Shape) -> None:
    config = new_model(shape, vocabulary=VOCABULARY).config
    assert config.head_dim % 32 == 0
    assert config.max_position_embeddings > MAX_TOKENS


def test_a_seed_gives_the_same_weights() -> None:
    one, two = (new_model(TINY, vocabulary=64).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_packing_keeps_every_token_but_the_rest_of_the_last_block() -> None:
    documents = [[document] * (document + 1) for document in range(9)]
    blocks = pack(documents, block=7, seed=1)
    assert blocks.shape == (sum(map(len, documents)) // 7, 7)
    lengths = torch.unique_consecutive(blocks.flatten(), return_counts=True)
    for document, length in list(zip(*lengths, strict=True))[:-1]:
        assert length == document + 1
    assert torch.equal(blocks, pack(documents, block=7, seed=1))
    assert not torch.equal(blocks, pack(documents, block=7, seed=2))


def test_a_killed_training_run_resumes_with_equal_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(models, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    unbroken = new_model(TINY, vocabulary=64)
    loss = pretrain(unbroken, blocks, checkpoint=tmp_path / "unbroken.pt", label="unbroken")

    class Killed(BaseException):
        pass

    save = models._save

    def save_and_die(path: Path, model: object, optimizers: list, step: int, losses: list[float]) -> None:
        save(path, model, optimizers, step, losses)
        if step == 3:
            raise Killed

    monkeypatch.setattr(models, "_save", save_and_die)
    with pytest.raises(Killed):
        pretrain(new_model(TINY, vocabulary=64), blocks, checkpoint=tmp_path / "broken.pt", label="broken")
    monkeypatch.setattr(models, "_save", save)
    resumed = new_model(TINY, vocabulary=64)
    assert pretrain(resumed, blocks, checkpoint=tmp_path / "broken.pt", label="resumed") == loss
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


class _Dtypes(TorchDispatchMode):
    """Records the dtypes of all tensors that operations read or return, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {leaf.dtype for leaf in tree_leaves([args, kwargs, result]) if isinstance(leaf, torch.Tensor)}
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
        return result


def test_a_training_step_on_a_cpu_multiplies_no_half_precision_numbers(tmp_path: Path) -> None:
    """A CPU without AVX512-BF16 multiplies bfloat16 70 times slower than float32: the demo took an hour there."""
    blocks = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with _Dtypes() as dtypes:
        pretrain(new_model(TINY, vocabulary=64), blocks, checkpoint=tmp_path / "c.pt", label="step")
    assert dtypes.products > 30, "forward, backward and the optimizer's products were recorded"
    assert dtypes.found <= {torch.float32, torch.float64, torch.int64, torch.bool}


def test_the_optimizer_is_torchs_muon_but_for_the_rounding_of_its_products() -> None:
    """So the measured learning rates hold, and a checkpoint of an earlier release resumes."""
    start = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    shapes = [start[0], start[1].T.contiguous(), start[2]]
    ours, torchs = ([torch.nn.Parameter(matrix.clone()) for matrix in shapes] for _ in range(2))
    optimizers = [models._Muon(ours, lr=0.02, weight_decay=0.1), torch.optim.Muon(torchs, lr=0.02, weight_decay=0.1)]
    for step in range(3):
        for matrix, other in zip(ours, torchs, strict=True):
            matrix.grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(step))
            other.grad = matrix.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for matrix, other, first in zip(ours, torchs, shapes, strict=True):
        assert (matrix - other).norm() < 0.02 * (other - first).norm()
    mine, theirs = (optimizer.state_dict() for optimizer in optimizers)
    assert mine["param_groups"] == theirs["param_groups"]
    assert [set(state) for state in mine["state"].values()] == [set(state) for state in theirs["state"].values()]
