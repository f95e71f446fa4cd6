"""Hooks that solve for the gradient of a fixed point, against the loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from tests.loop import loop
from tests.same import assert_same

Tensor = torch.Tensor
DTYPE = torch.float64

torch.manual_seed(0)
CELL = nn.Linear(3, 3).double()
with torch.no_grad():
    CELL.weight.mul_(0.3)


def step(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(CELL(z) + x)


def equilibrium(x: Tensor, early: bool = False) -> Tensor:
    """The layer of the tutorial "Deep Implicit Layers", chapter 4."""
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(20):
            z = step(z, x)
    z = step(z, x)
    if early:
        shift = torch.zeros_like(z)
        handle = z.register_hook(lambda g: g + shift) if z.requires_grad else None
    start = z.clone().detach().requires_grad_()
    end = step(start, x.detach())
    if early and handle is not None:
        handle.remove()

    def solve(grad: Tensor) -> Tensor:
        found = grad
        for _ in range(20):
            found = torch.autograd.grad(end, start, found, retain_graph=True)[0] + grad
        return found

    if z.requires_grad:
        z.register_hook(solve)
    return z


def used_afterwards(x: Tensor) -> Tensor:
    z = equilibrium(x)
    return (z * z.sum()).sin() + z


def two_layers(x: Tensor) -> Tensor:
    return equilibrium(equilibrium(x).cos(), early=True)


WAYS: dict[str, dict] = {
    "plain": {},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
    "lanes": {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    "remat": {"chunk_size": 2, "remat": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", [equilibrium, used_afterwards, two_layers])
def test_gradients_are_those_of_the_loop(function: Callable[[Tensor], Tensor], way: str) -> None:
    x = torch.randn(5, 3, dtype=DTYPE, requires_grad=True)
    ins = [x, CELL.weight, CELL.bias]
    mapped, weight = shardmap.vmap(function, **WAYS[way]), torch.randn(5, 3, dtype=DTYPE)
    want = loop(function)(x)
    wanted = torch.autograd.grad((want * weight).sum(), ins)
    for call in range(4):
        got = mapped(x)
        assert_same(got, want, f"call {call}")
        found = torch.autograd.grad((got * weight).sum(), ins)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b, f"call {call}")


def test_a_second_derivative_is_refused() -> None:
    """What the hook keeps of uses before has a history that does not pass through it."""

    def function(r: Tensor) -> Tensor:
        t = r.sin()
        kept = t * 2
        t.register_hook(lambda g: g * kept)
        return t.view_as(t)

    x = torch.randn(5, 3, dtype=DTYPE, requires_grad=True)
    (want,) = torch.autograd.grad(loop(function)(x).sum(), x)
    (got,) = torch.autograd.grad(shardmap.vmap(function)(x).sum(), x, create_graph=True)
    assert_same(got, want, "first")
    with pytest.raises(errors.AutogradFunctionError, match="register the hook before"):
        torch.autograd.grad(got.sum(), x)
