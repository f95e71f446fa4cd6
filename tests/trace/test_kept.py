"""Tensors that outlive a recording, and those that only seem to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shardmap.call.arguments import collect
from shardmap.trace.record import record

Function = Callable[[torch.Tensor], Any]
Made = Callable[[], tuple[Function, Any]]


def kept(function: Function, rows: torch.Tensor) -> tuple[str, ...]:
    batch = collect((rows,), {}, 0, 0, "test")
    found = record(function, batch, "error", False, "test", look=True)[0].kept
    assert found is not None
    return found


def attribute() -> tuple[Function, Any]:
    class Net(nn.Module):
        hidden: torch.Tensor

        def forward(self, r: torch.Tensor) -> torch.Tensor:
            self.hidden = r * 2
            return self.hidden.sum()

    net = Net()
    return net, net


def appended() -> tuple[Function, Any]:
    seen: list[torch.Tensor] = []

    def function(r: torch.Tensor) -> torch.Tensor:
        seen.append(r.sin())
        return r.sum()

    return function, seen


def hooked() -> tuple[Function, Any]:
    net, total = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), {}

    def hook(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        total["sum"] = total.get("sum", 0) + out

    net[0].register_forward_hook(hook)
    return lambda r: net(r).sum(), total


def in_a_closure() -> tuple[Function, Any]:
    memory: dict[str, Any] = {}

    def function(r: torch.Tensor) -> torch.Tensor:
        memory["last"] = {"nested": (r.cos(),)}
        return r * 3

    return function, memory


LAST: Any = None


def in_a_global() -> tuple[Function, Any]:
    def function(r: torch.Tensor) -> torch.Tensor:
        global LAST
        LAST = r + 1
        return r * 3

    return function, None


def a_gradient() -> tuple[Function, Any]:
    found: list[torch.Tensor] = []

    def function(r: torch.Tensor) -> torch.Tensor:
        q = r.detach().requires_grad_()
        y = q * r
        y.register_hook(lambda g: found.append(g * r))
        return torch.autograd.grad(y.sin().sum(), q)[0]

    return function, found


KEPT: list[Made] = [attribute, appended, hooked, in_a_closure, in_a_global, a_gradient]


def outputs() -> tuple[Function, Any]:
    return lambda r: (r * 2, [r.sin()], {"a": r.cos().sum()}, r), None


def saved_for_outputs() -> tuple[Function, Any]:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3), nn.LayerNorm(3))
    return lambda r: net(r.sin()).exp().square().sum(), net


def unmapped_cache() -> tuple[Function, Any]:
    @functools.lru_cache
    def table(size: int) -> torch.Tensor:
        return torch.arange(size).float().sin()

    return lambda r: r * table(3), table


def unmapped_attribute() -> tuple[Function, Any]:
    class Net(nn.Module):
        mask: torch.Tensor

        def forward(self, r: torch.Tensor) -> torch.Tensor:
            self.mask = torch.ones(3).cumsum(0)
            return r * self.mask

    net = Net()
    return net, net


def cycles() -> tuple[Function, Any]:
    def function(r: torch.Tensor) -> torch.Tensor:
        node: dict[str, Any] = {"value": r.sin()}
        node["self"] = node

        def recurse(n: int) -> torch.Tensor:
            return r * 2 if n == 0 else recurse(n - 1) + node["value"]

        return recurse(3)

    return function, None


def views() -> tuple[Function, Any]:
    return lambda r: (r * 2).view(3, 1).t()[0], None


def local_gradient() -> tuple[Function, Any]:
    def function(r: torch.Tensor) -> torch.Tensor:
        w = torch.zeros(3, requires_grad=True)
        ((w - r) ** 2).sum().backward()
        assert w.grad is not None
        return w.grad * 2

    return function, None


def func_transform() -> tuple[Function, Any]:
    return torch.func.hessian(lambda r: r.sin().prod()), None


def indexed() -> tuple[Function, Any]:
    return lambda r: r[r.argmax()] * r, None


def through_an_exception() -> tuple[Function, Any]:
    def function(r: torch.Tensor) -> torch.Tensor:
        try:
            local = r * 2
            raise ValueError(local.shape)
        except ValueError as error:
            first = error
        return r * len(first.args)

    return function, None


NOT_KEPT: list[Made] = [
    outputs,
    saved_for_outputs,
    unmapped_cache,
    unmapped_attribute,
    cycles,
    views,
    local_gradient,
    func_transform,
    indexed,
    through_an_exception,
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("made", KEPT, ids=lambda f: f.__name__)
def test_what_is_kept_is_found(made: Made, grad: bool) -> None:
    function, _holder = made()
    for _ in range(2):
        found = kept(
            function,
            torch.randn(4, 3, requires_grad=grad) if made is not a_gradient else torch.randn(4, 3),
        )
        assert len(found) == 1, found
        assert "shape" in found[0]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("made", NOT_KEPT, ids=lambda f: f.__name__)
def test_what_only_seems_to_be_kept(made: Made, grad: bool) -> None:
    function, _holder = made()
    for _ in range(2):
        assert kept(function, torch.randn(4, 3, requires_grad=grad)) == ()


def test_the_place_is_named() -> None:
    function, _net = attribute()
    assert "'hidden'" in kept(function, torch.randn(4, 3))[0]
