"""Laws of the fused head: it is the logits path and plain autograd to the last digits, without any `[M, V]` tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from coldstill.trainer.loss_kernels.fused_head import Head, LossValues, Objective, loss_on_hidden, loss_on_logits
from coldstill.trainer.targets import SparseTargets
from tests.trainer.loss_kernels.random_targets import OBJECTIVES, plain_view, random_targets

M, D, V, PADDING = 11, 6, 40, 3
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "padding rows": {"padding": PADDING},
    "softcap": {"softcap": 3.0},
    "all of them": {"bias": True, "padding": PADDING, "softcap": 3.0},
}


def make_head(*, bias: bool = False, padding: int = 0, softcap: float | None = None) -> Head:
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(V + padding, D, generator=random, dtype=torch.float64).requires_grad_()
    biases = torch.randn(V + padding, generator=random, dtype=torch.float64).requires_grad_() if bias else None
    return Head(weight=weight, bias=biases, token_count=V, softcap=softcap)


def make_hidden(positions: int = M) -> torch.Tensor:
    return torch.randn(positions, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


def plain_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)[:, : head.token_count]
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def leaves(hidden: torch.Tensor, head: Head) -> list[torch.Tensor]:
    return [it for it in (hidden, head.weight, head.bias) if it is not None and it.requires_grad]


def fused(
    hidden: torch.Tensor, head: Head, targets: SparseTargets, objective: Objective, **more: Any
) -> tuple[torch.Tensor, LossValues]:
    return loss_on_hidden(hidden, head, targets, objective, **{"t": 0.4, "chunk_bytes": 4 * V * 8, **more})


class Made(TorchDispatchMode):
    """The shape of every tensor that an operation returns while this is on."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for it in result if isinstance(result, tuple | list) else [result]:
            if isinstance(it, torch.Tensor):
                self.shapes.append((str(function), tuple(it.shape)))
        return result

    def largest(self) -> int:
        return max(torch.Size(shape).numel() for _, shape in self.shapes)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_fused_is_the_logits_path_and_plain_autograd(objective: Objective, head: dict[str, Any], t: float) -> None:
    hidden, made, targets = make_hidden(), make_head(**head), random_targets(M, V)
    logits = plain_logits(hidden, made)
    total, values = fused(hidden, made, targets, objective, t=t, weight=0.7)
    sides = [
        loss_on_logits(logits, targets, objective, t=t, weight=0.7)[0],
        0.7 * objective(plain_view(logits, targets), targets, t=t).loss.sum(),
    ]
    gradients = torch.autograd.grad(3 * total, leaves(hidden, made))
    assert values.loss.shape == values.distillation.shape == values.bucket_kl.shape == (M,)
    for side in sides:
        torch.testing.assert_close(total, side, rtol=0, atol=1e-12)
        wanted = torch.autograd.grad(3 * side, leaves(hidden, made), retain_graph=True)
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 10, 11, 12, 1000])
def test_the_size_of_chunks_changes_nothing(rows: int) -> None:
    hidden, head, targets = make_hidden(), make_head(bias=True, softcap=3.0, padding=PADDING), random_targets(M, V)
    whole, _ = fused(hidden, head, targets, OBJECTIVES["taid"], chunk_bytes=1 << 30)
    total, values = fused(hidden, head, targets, OBJECTIVES["taid"], chunk_bytes=rows * V * 8)
    assert values.loss.shape == (M,)
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-12)
    pairs = [torch.autograd.grad(it, leaves(hidden, head)) for it in (total, whole)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_tied_weights_get_the_sum_of_both_gradients() -> None:
    targets, tokens = random_targets(M, V), torch.arange(M) * 3 % V
    gradients = []
    for path in ("fused", "logits"):
        weight = make_head().weight
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        head = Head(weight=weight, bias=None, token_count=V)
        if path == "fused":
            total, _ = fused(hidden, head, targets, OBJECTIVES["taid"])
        else:
            total, _ = loss_on_logits(plain_logits(hidden, head), targets, OBJECTIVES["taid"], t=0.4)
        gradients += torch.autograd.grad(total, weight)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_a_frozen_head_gets_no_gradient_and_its_product_is_not_computed() -> None:
    hidden, free, targets = make_hidden(), make_head(bias=True), random_targets(M, V)
    frozen = Head(weight=free.weight.detach(), bias=free.bias.detach(), token_count=V)  # type: ignore[union-attr]
    made = {}
    for name, head in (("free", free), ("frozen", frozen)):
        with Made() as made[name]:
            total, _ = fused(hidden, head, targets, OBJECTIVES["taid"])
    by_weight = {name: [op for op, shape in it.shapes if shape == (V, D) and "mm" in op] for name, it in made.items()}
    assert len(by_weight["free"]) == 3
    assert by_weight["frozen"] == []
    (found,) = torch.autograd.grad(total, hidden)
    (wanted,) = torch.autograd.grad(fused(hidden, free, targets, OBJECTIVES["taid"])[0], hidden)
    assert torch.equal(found, wanted)


def test_frozen_hidden_states_leave_the_head_s_gradient_alone() -> None:
    hidden, head, targets = make_hidden(), make_head(bias=True), random_targets(M, V)
    wanted = torch.autograd.grad(fused(hidden, head, targets, OBJECTIVES["taid"])[0], leaves(hidden, head)[1:])
    with Made() as made:
        total, _ = fused(hidden.detach(), head, targets, OBJECTIVES["taid"])
    assert not [op for op, shape in made.shapes if shape[-1:] == (D,) and shape[0] < V and "mm" in op]
    for one, other in zip(torch.autograd.grad(total, leaves(hidden, head)[1:]), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", ["no_grad", "all frozen"])
def test_where_no_gradient_can_be_wanted_none_is_computed(how: str) -> None:
    hidden, head, targets = make_hidden(), make_head(), random_targets(M, V)
    wanted, _ = fused(hidden, head, targets, OBJECTIVES["taid"])
    frozen = Head(weight=head.weight.detach(), bias=None, token_count=V)
    with torch.set_grad_enabled(how != "no_grad"), Made() as made:
        if how == "no_grad":
            total, _ = fused(hidden, head, targets, OBJECTIVES["taid"])
        else:
            total, _ = fused(hidden.detach(), frozen, targets, OBJECTIVES["taid"])
    assert not total.requires_grad
    assert torch.equal(total, wanted)
    products = [shape for op, shape in made.shapes if "mm" in op]
    assert all(shape[1] == V for shape in products)
    assert len(products) == 3


def test_no_positions_give_a_loss_of_0_and_gradients_of_0() -> None:
    hidden, head, targets = make_hidden(0), make_head(bias=True, padding=PADDING), random_targets(0, V)
    total, values = fused(hidden, head, targets, OBJECTIVES["taid"])
    assert total.item() == 0
    assert values.loss.shape == (0,)
    for leaf, gradient in zip(leaves(hidden, head), torch.autograd.grad(total, leaves(hidden, head)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_padding_rows_of_the_head_get_no_gradient() -> None:
    hidden, head, targets = make_hidden(), make_head(bias=True, padding=PADDING), random_targets(M, V)
    total, _ = fused(hidden, head, targets, OBJECTIVES["taid"])
    _, by_weight, by_bias = torch.autograd.grad(total, leaves(hidden, head))
    assert by_weight.shape == (V + PADDING, D)
    assert torch.equal(by_weight[V:], torch.zeros(PADDING, D, dtype=torch.float64))
    assert torch.equal(by_bias[V:], torch.zeros(PADDING, dtype=torch.float64))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_tensor_of_all_positions_and_the_vocabulary_is_ever_made(softcap: float | None) -> None:
    positions, width, vocabulary, rows = 300, 8, 500, 10
    random = torch.Generator().manual_seed(4)
    hidden = torch.randn(positions, width, generator=random).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=random).requires_grad_()
    targets = random_targets(positions, vocabulary, dtype=torch.float32)
    head = Head(weight=weight, bias=None, token_count=vocabulary, softcap=softcap)
    with Made() as made:
        total, _ = loss_on_hidden(hidden, head, targets, OBJECTIVES["taid"], t=0.4, chunk_bytes=rows * vocabulary * 4)
        torch.autograd.grad(total, [hidden, weight])
    assert made.largest() == rows * vocabulary
    chunks = {op for op, shape in made.shapes if shape == (rows, vocabulary) and ("empty" in op or "zeros" in op)}
    assert len([op for op, shape in made.shapes if shape == (rows, vocabulary) and "empty" in op]) <= 2, chunks


def test_under_autocast_factors_are_bfloat16_and_logits_loss_and_sums_are_float32() -> None:
    positions, width, vocabulary = 256, 64, 300
    random = torch.Generator().manual_seed(6)
    hidden = torch.randn(positions, width, generator=random)
    weight = torch.randn(vocabulary, width, generator=random) / 4
    targets = random_targets(positions, vocabulary, dtype=torch.float32)

    def gradients(hidden: torch.Tensor, weight: torch.Tensor, *, autocast: bool) -> list[torch.Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        head = Head(weight=w, bias=None, token_count=vocabulary)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total, values = loss_on_hidden(h, head, targets, OBJECTIVES["taid"], t=0.4, chunk_bytes=10 * vocabulary * 4)
        assert values.loss.dtype == total.dtype == torch.float32
        return [total.detach(), values.loss, *torch.autograd.grad(total, [h, w])]

    found = gradients(hidden, weight, autocast=True)
    assert [it.dtype for it in found] == [torch.float32] * 4
    # Of factors that are bfloat16 already everything else is as in float32, but for the rounding of the gradient.
    rounded = gradients(hidden.bfloat16().float(), weight.bfloat16().float(), autocast=False)
    torch.testing.assert_close(found[1], rounded[1], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[2:], rounded[2:], strict=True):
        assert (one - other).norm() <= 2**-8 * other.norm()
    # Rounding the factors to 8 bits is a relative error of 2^-9 each.
    exact = gradients(hidden, weight, autocast=False)
    assert (found[0] - exact[0]).abs() <= 2**-8 * exact[0].abs()
    for one, other in zip(found[2:], exact[2:], strict=True):
        assert 0 < (one - other).norm() <= 2**-6 * other.norm()


def test_bfloat16_parameters_get_bfloat16_gradients_summed_in_float32() -> None:
    hidden = make_hidden(400).detach().bfloat16().requires_grad_()
    weight = make_head().weight.detach().bfloat16().requires_grad_()
    targets = random_targets(400, V, dtype=torch.float32)
    head = Head(weight=weight, bias=None, token_count=V)
    total, values = fused(hidden, head, targets, OBJECTIVES["taid"])
    by_hidden, by_weight = torch.autograd.grad(total, [hidden, weight])
    assert values.loss.dtype == total.dtype == torch.float32
    assert by_hidden.dtype == by_weight.dtype == torch.bfloat16
    wide = [it.detach().double().requires_grad_() for it in (hidden, weight)]
    exact, _ = fused(
        wide[0], Head(weight=wide[1], bias=None, token_count=V), random_targets(400, V), OBJECTIVES["taid"]
    )
    for one, other in zip((by_hidden, by_weight), torch.autograd.grad(exact, wide), strict=True):
        # One rounding at the end: 200 chunks added up in bfloat16 would be off by several times as much.
        assert (one.double() - other).norm() <= 2**-8 * other.norm()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_float32_stays_close_to_float64_at_extreme_logits(scale: float) -> None:
    random = torch.Generator().manual_seed(8)
    hidden = scale * torch.randn(64, 16, generator=random)
    weight = torch.randn(200, 16, generator=random)
    found = []
    for dtype in (torch.float32, torch.float64):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        head = Head(weight=w, bias=None, token_count=200)
        targets = random_targets(64, 200, dtype=dtype)
        total, values = loss_on_hidden(h, head, targets, OBJECTIVES["taid"], t=0.4, chunk_bytes=7 * 200 * 4)
        found.append([values.loss, *torch.autograd.grad(total, [h, w])])
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    hidden, head, targets = make_hidden(), make_head(), random_targets(M, V)
    total, _ = fused(hidden, head, targets, OBJECTIVES["taid"])
    torch.autograd.grad(2 * total, leaves(hidden, head), retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(2 * total, leaves(hidden, head))


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_gradient_checkpointing_changes_nothing(inside: bool) -> None:
    head, targets = make_head(bias=True), random_targets(M, V)
    first = torch.randn(D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()
    inputs = make_hidden().detach()

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ first).tanh()

    def whole(hidden: torch.Tensor) -> torch.Tensor:
        return fused(layer(hidden), head, targets, OBJECTIVES["taid"])[0]

    if inside:
        total = checkpoint(whole, inputs, use_reentrant=False)
    else:
        total = fused(checkpoint(layer, inputs, use_reentrant=False), head, targets, OBJECTIVES["taid"])[0]
    parameters = [first, *leaves(inputs, head)]
    for one, other in zip(
        torch.autograd.grad(total, parameters), torch.autograd.grad(whole(inputs), parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_a_compiled_student_gives_the_same_loss_and_gradients() -> None:
    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Linear(D, D), torch.nn.Linear(D, V, bias=False)

        def forward(self, inputs: torch.Tensor, targets: SparseTargets, t: float) -> torch.Tensor:
            head = Head(weight=self.head.weight, bias=None, token_count=V)
            return fused(self.body(inputs).tanh(), head, targets, OBJECTIVES["taid"], t=t)[0]

    torch.manual_seed(0)
    student, inputs, targets = Student().double(), make_hidden().detach(), random_targets(M, V)
    # How the student's own layers are compiled is not looked at here: this takes no C compiler.
    compiled = torch.compile(student, backend="eager")
    for t in (0.4, 0.41):
        totals = student(inputs, targets, t), compiled(inputs, targets, t)
        gradients = [torch.autograd.grad(total, list(student.parameters())) for total in totals]
        assert torch.equal(*totals)
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
