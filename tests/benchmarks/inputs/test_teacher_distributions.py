"""The benchmark's teacher: sampling all ids gives the full loss, and its temperature gives the wanted entropy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.codec.grid_study import inverse_grid
from benchmarks.inputs import small_language_model, teacher_distributions
from benchmarks.inputs.machine_text import Document
from benchmarks.inputs.small_language_model import SmallLanguageModel, sampled_loss
from benchmarks.inputs.teacher_distributions import Teacher, temperature_of


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> SmallLanguageModel:
    monkeypatch.setattr(small_language_model, "VOCABULARY", 50)
    monkeypatch.setattr(small_language_model, "HASH_ROWS", 64)
    torch.manual_seed(0)
    return SmallLanguageModel()


def losses(model: SmallLanguageModel, *, sampled: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """The mean of many sampled losses, and the loss over the whole vocabulary."""
    monkeypatch.setattr(small_language_model, "SAMPLED_IDS", sampled)
    generator = torch.Generator().manual_seed(1)
    share = torch.full((50,), 0.02, dtype=torch.float64)
    found = []
    with torch.no_grad():
        model.head.weight.normal_()
        for _ in range(400):
            # The frequencies say uniform, so the labels must be.
            rows = torch.randint(0, 50, (2, 9), generator=generator)
            whole = model(rows[:, :-1]).reshape(16, -1) @ model.head.weight.T
            exact = torch.nn.functional.cross_entropy(whole, rows[:, 1:].reshape(-1))
            found.append((float(sampled_loss(model, rows, share=share, generator=generator)), float(exact)))
    means = np.mean(found, axis=0)
    return float(means[0]), float(means[1])


def test_with_every_id_sampled_the_loss_is_that_of_the_full_softmax(
    small: SmallLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, whole = losses(small, sampled=50, monkeypatch=monkeypatch)
    assert sampled == pytest.approx(whole, rel=1e-5)


def test_with_some_ids_sampled_the_loss_is_near_that_of_the_full_softmax(
    small: SmallLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not equal: the log of an unbiased normaliser is a little low.
    sampled, whole = losses(small, sampled=25, monkeypatch=monkeypatch)
    assert whole - 0.25 * whole < sampled < whole + 0.05 * whole


def test_hidden_states_do_not_depend_on_later_tokens(small: SmallLanguageModel) -> None:
    ids = torch.randint(0, 50, (1, 12))
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    with torch.no_grad():
        small.hashed.weight.normal_()
        torch.testing.assert_close(small(ids)[:, :7], small(changed)[:, :7])
        assert not torch.allclose(small(ids)[:, 7:], small(changed)[:, 7:])


def test_the_temperature_gives_the_wanted_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_distributions, "TEST_ROWS", 20)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(20, 8, 16, generator=generator)
    head = torch.randn(300, 16, generator=generator)
    teacher = Teacher(tokens=torch.zeros(20, 9, dtype=torch.int64), hidden=hidden, head=head, text="")
    temperature = temperature_of(teacher, entropy=1.2)
    logs = torch.log_softmax(hidden.double() @ head.double().T / temperature, -1)
    assert float(-(logs.exp() * logs).sum(-1).mean()) == pytest.approx(1.2, abs=0.005)


def test_about_a_tenth_of_the_documents_is_held_out_by_name() -> None:
    held_out = [Document(name=f"library/{n}.py", text="").held_out for n in range(2000)]
    assert 0.07 < np.mean(held_out) < 0.13


@pytest.mark.parametrize(("a", "b"), [(96.0, 1), (384.0, 8), (1448.0, 1)])
def test_the_inverse_of_a_grid_returns_its_levels(a: float, b: float) -> None:
    x = -inverse_grid(900, a=a, b=b)
    np.testing.assert_array_equal(np.floor(a * (1 - np.exp(-x / 2)) + b * x + 0.5), np.arange(900))
