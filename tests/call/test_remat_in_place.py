"""`remat=True` and writes over what autograd has saved: right by finite differences, or refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmap
from shardmap import errors

PURE: list[Callable[[Tensor], Tensor]] = [
    torch.sin,
    lambda t: t.exp().tanh(),
    lambda t: t * t,
    torch.sigmoid,
    lambda t: t.softmax(0),
    lambda t: t / (1 + t.abs()),
    lambda t: t.logsumexp(0) - t,
]
WRITES: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.mul_(1.3),
    torch.sigmoid_,
    torch.tanh_,
    lambda t: t.add_(0.2),
    torch.neg_,
    lambda t: t.pow_(2),
]
VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda y: y,
    lambda y: y[:3],
    lambda y: y[3:],
    lambda y: y[::2],
    lambda y: y.view(2, 3)[0],
    lambda y: y.view(2, 3)[:, 1],
]


def program(seed: int) -> Callable[[Tensor], Tensor]:
    """A function of 6 numbers that reads and writes views of a copy."""
    draw = random.Random(seed)
    steps = [
        (draw.randrange(4), draw.choice(VIEWS), draw.choice(VIEWS), draw.choice(PURE),
         draw.choice(WRITES))
        for _ in range(draw.randint(2, 6))
    ]  # fmt: skip

    def function(x: Tensor) -> Tensor:
        y, total = x * 1.0, x.new_zeros(())
        for kind, first, second, pure, write in steps:
            a, b = first(y), second(y)
            n = min(len(a), len(b))
            if kind == 0:
                write(a)
            elif kind == 1:
                a[:n] = pure(b)[:n]
            elif kind == 2:
                a[:n] += pure(b)[:n]
            else:
                total = total + pure(a).sum()
        return torch.cat([y, total[None]])

    return function


def gradient(run: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor | Exception:
    x = x.clone().requires_grad_()
    try:
        return torch.autograd.grad((run(x) * weight).sum(), x)[0]
    except (RuntimeError, errors.TransformError) as error:
        return error


def slopes(f: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """The gradient by central differences."""
    step = 1e-6
    return torch.stack(
        [
            torch.stack([((f(r + d) - f(r - d)) * weight).sum() / (2 * step) for d in step * torch.eye(6).double()])
            for r in x
        ]
    )  # fmt: skip


WAYS: dict[str, dict[str, Any]] = {
    "chunks": {"chunk_size": 3},
    "two lanes": {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    "each": {"chunk_size": 2, "trace": "each"},
    "once": {"chunk_size": 3, "trace": "once"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(24))
def test_gradients_of_programs_that_write(seed: int, way: str) -> None:
    f = program(seed)
    mapped = shardmap.vmap(f, remat=True, **WAYS[way])
    torch.manual_seed(seed)
    weight = torch.randn(7, dtype=torch.float64)
    for _ in range(2):
        x = torch.randn(5, 6, dtype=torch.float64)
        expected = gradient(lambda b: torch.stack([f(r) for r in b]), x, weight)
        found = gradient(mapped, x, weight)
        if isinstance(expected, Tensor):
            torch.testing.assert_close(found, expected)
        elif isinstance(found, Tensor):
            torch.testing.assert_close(found, slopes(f, x, weight), rtol=1e-4, atol=1e-6)
        else:
            assert isinstance(found, errors.TransformError) or "inplace" in str(found)


def test_the_refusal_and_its_remedies() -> None:
    def over_what_is_saved(r: Tensor) -> Tensor:
        y = r * 1.0
        for i in range(1, 6):
            y[i] = y[i] * y[i - 1].sin() + 1
        return y

    def out_of_place(r: Tensor) -> Tensor:
        y = [r[0]]
        for i in range(1, 6):
            y.append(r[i] * y[-1].sin() + 1)
        return torch.stack(y)

    def cloned(r: Tensor) -> Tensor:
        y = r * 1.0
        for i in range(1, 6):
            y = y.clone()
            y[i] = y[i].clone() * y[i - 1].clone().sin() + 1
        return y

    x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    refused = gradient(shardmap.vmap(over_what_is_saved, remat=True, chunk_size=2), x, weight)
    assert isinstance(refused, errors.TransformError)
    assert "write out of place, or clone what is written" in str(refused)
    expected = gradient(lambda b: torch.stack([out_of_place(r) for r in b]), x, weight)
    for remedy in (out_of_place, cloned):
        found = gradient(shardmap.vmap(remedy, remat=True, chunk_size=2), x, weight)
        torch.testing.assert_close(found, expected)
