"""Objects that a function makes and only a hook holds, with tensors of the sample in them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

import shardmap
from tests.same import assert_same

Tensor = torch.Tensor


class Scaling:
    """A hook that holds a number or a tensor."""

    def __init__(self, factor: float | Tensor):
        self.factor = factor

    def __call__(self, g: Tensor) -> Tensor:
        return g * self.factor

    def method(self, g: Tensor) -> Tensor:
        return g * self.factor


class Collecting:
    """A hook that keeps the gradients that it has seen."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, g: Tensor) -> Tensor:
        self.seen.append(g)
        return g * len(self.seen) + self.seen[-1]


def of_a_number(r: Tensor) -> Callable[[Tensor], Tensor]:
    return Scaling(3.0)


def of_a_tensor(r: Tensor) -> Callable[[Tensor], Tensor]:
    return Scaling(r.detach() * 2)


def of_a_method(r: Tensor) -> Callable[[Tensor], Tensor]:
    return Scaling(r.detach() * 2).method


def of_a_partial(r: Tensor) -> Callable[[Tensor], Tensor]:
    return functools.partial(torch.mul, Scaling(r.detach().sin())(r.detach()))


def of_a_closure(r: Tensor) -> Callable[[Tensor], Tensor]:
    inner = Scaling(r.detach().exp())
    return lambda g: inner(g) + inner.factor


def of_one_that_collects(r: Tensor) -> Callable[[Tensor], Tensor]:
    return Collecting()


HOOKS = (of_a_number, of_a_tensor, of_a_method, of_a_partial, of_a_closure, of_one_that_collects)


@pytest.mark.parametrize("trace", ["auto", "once"])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
def test_gradients_are_those_of_the_loop(hook: Callable, trace: str) -> None:
    def function(r: Tensor) -> Tensor:
        h = r * 1
        h.register_hook(hook(r))
        return h.sin()

    mapped = shardmap.vmap(function, trace=trace)
    for seed in range(4):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        (found,) = torch.autograd.grad(mapped(x).square().sum(), x)
        by_loop = torch.stack([function(x[i]) for i in range(len(x))])
        (expected,) = torch.autograd.grad(by_loop.square().sum(), x)
        assert_same(found, expected, hook.__name__)
