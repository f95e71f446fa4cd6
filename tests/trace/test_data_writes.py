"""Writes through `tensor.data`, which autograd does not see, under gradients from outside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from tests.trace.test_own_backwards import DTYPE, WAYS, M, S, W, batch, compared

Tensor = torch.Tensor


class Assign(torch.autograd.Function):
    """Writes a part of a buffer, as torchdiffeq's solvers do."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, value: Tensor, index: Any) -> Tensor:
        ctx.index = index
        buffer.data[index] = value
        return buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad[ctx.index], None


def runge_kutta(r: Tensor) -> Tensor:
    """Stages in the columns of one buffer, each read by all later ones."""
    k = Assign.apply(torch.empty(3, 4, dtype=DTYPE), (r * W).sin(), (..., 0))
    for i in range(3):
        y = r + (k[..., : i + 1] * (M[i, : i + 1] * S)).sum(-1)
        k = Assign.apply(k, (y * W).sin(), (..., i + 1))
    return r + (k * S).sum(-1)


def a_buffer_that_is_saved(r: Tensor) -> Tensor:
    """`W * buffer` keeps the buffer, whose other half is written afterwards."""
    buffer = torch.zeros(6, dtype=DTYPE)
    buffer.data[:3] = r
    first = buffer[:3] * W
    buffer.data[3:] = r.exp()
    return first + buffer[3:] * W


def all_of_a_saved_tensor(r: Tensor) -> Tensor:
    """The backward of the product reads what was written to `h` after it."""
    h = (r * 2).clone()
    y = h * W
    h.data.mul_(3)
    return y + h


def read_only(r: Tensor) -> Tensor:
    t = (r * W).exp()
    return t * t.data.sum() + r.data


FUNCTIONS = (runge_kutta, a_buffer_that_is_saved, all_of_a_saved_tensor, read_only)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_those_of_the_loop(function: Callable[[Tensor], Tensor], way: str) -> None:
    for rows, grad in ((5, True), (5, False), (1, True), (3, True)):
        compared(function, batch(rows, grad), f"{function.__name__}, {rows}", **WAYS[way])


def _solved(r: Tensor, rate: Tensor, steps: dict[str, Any]) -> Tensor:
    """The Van der Pol oscillator from `r`, with a parameter that requires grad."""
    from torchdiffeq import odeint

    def velocity(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], rate * (1 - y[0] ** 2) * y[1] - y[0]])

    return odeint(velocity, r, torch.linspace(0, 1, 4, dtype=DTYPE), rtol=1e-5, **steps)


@pytest.mark.parametrize(
    ("method", "way"),
    [
        *[("dopri5", way) for way in ("whole", "chunks_of_three", "two_lanes", "once", "remat")],
        ("bosh3", "two_lanes"),
        ("rk4", "chunks_of_three"),
    ],
)
def test_gradients_of_an_ordinary_differential_equation(method: str, way: str) -> None:
    rate = torch.tensor(1.5, dtype=DTYPE, requires_grad=True)
    x = batch(5, True)
    steps = {"method": method} | ({"options": {"step_size": 0.1}} if method == "rk4" else {})

    def function(r: Tensor) -> Tensor:
        return _solved(r[:2], rate, steps)

    want = torch.stack([function(r) for r in x])
    mapped = shardmap.vmap(function, **WAYS[way])
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", shardmap.SlowLoopWarning)
            got = mapped(x)
        for i in range(5):  # d(solution)/d(parameter) of each sample
            torch.testing.assert_close(got[i], want[i])
            for a, b in zip(
                torch.autograd.grad(got[i, -1].sum(), [rate, x], retain_graph=True),
                torch.autograd.grad(want[i, -1].sum(), [rate, x], retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(a, b)


LABELS = torch.tensor([[0, 2], [1, 1], [2, 0]])


def through_detach(labels: Tensor, x: Tensor) -> Tensor:
    x.detach().add_(labels[0])
    return x * 2


def of_a_largest_norm(labels: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.embedding(labels, x, max_norm=1.0)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"trace": "once"}, {"trace": "each"}])
@pytest.mark.parametrize("function", [through_detach, of_a_largest_norm])
def test_rows_of_a_leaf_may_be_written_past_autograd(
    function: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    mapped = shardmap.vmap(function, **options)
    for seed in range(4):
        made = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(seed)) * 3
        mine, own = made.clone().requires_grad_(), made.clone().requires_grad_()
        found = mapped(LABELS, mine)
        want = torch.stack([function(LABELS[k], own[k]) for k in range(3)])
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(mine, own)
        (got,) = torch.autograd.grad(found.square().sum(), mine)
        (wanted,) = torch.autograd.grad(want.square().sum(), own)
        torch.testing.assert_close(got, wanted)
