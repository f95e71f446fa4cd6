"""Function modes of the caller's around a map: they are as they were afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import shardmap
from shardmap._torch import function_modes
from tests.trace.ways import WAYS

NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def by_autograd(r: Tensor) -> Tensor:
    own = r.detach().requires_grad_()
    return torch.autograd.grad(NET(own).sum(), own)[0]


def by_func(r: Tensor) -> Tensor:
    return torch.func.grad(lambda z: NET(z).sum())(r)


def by_weights(r: Tensor) -> Any:
    weights = {name: p.detach() for name, p in NET.named_parameters()}
    return torch.func.grad(lambda w: torch.func.functional_call(NET, w, (r,)).sum())(weights)


class Seeing(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trace", ["auto", "once", "each"])
@pytest.mark.parametrize("function", [by_autograd, by_func, by_weights])
def test_the_callers_modes_are_as_they_were(function: Callable[..., Any], trace: str) -> None:
    mapped = shardmap.vmap(function, trace=trace)
    for seed in range(4):
        x = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()
        rows = [function(r) for r in x]
        want = pytree.tree_map(lambda *ts: torch.stack(ts), *rows)
        seeing = Seeing()
        for around in (seeing, torch.device("cpu")):
            with around:
                before = function_modes()
                torch.testing.assert_close(mapped(x), want)
                assert function_modes() == before
                torch.zeros(1)
        assert seeing.seen[-1] == "zeros"
        assert not function_modes()


class Doubled(TorchFunctionMode):
    """A mode of the caller's, which changes what a sine is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func in (torch.sin, torch.Tensor.sin) else result


class SineOfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.sin(ctx.saved_tensors[0])


def hooked(r: torch.Tensor) -> torch.Tensor:
    h = r * 2
    h.register_hook(torch.sin)
    return h * h.sin()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", [SineOfGradient.apply, hooked])
def test_a_function_mode_around_the_map_is_not_around_its_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], way: dict[str, Any]
) -> None:
    mapped = shardmap.vmap(lambda r: function(r), **way)
    for size in (1, 3, 7, 7):
        x = torch.linspace(0, 2, 4 * size, dtype=torch.float64).view(size, 4).requires_grad_()
        with Doubled():
            found = mapped(x)
            wanted = torch.stack([function(r) for r in x])
        torch.testing.assert_close(found, wanted)
        got = torch.autograd.grad(found.sum(), x)
        torch.testing.assert_close(got, torch.autograd.grad(wanted.sum(), x))
    out, rows = mapped(x), torch.stack([function(r) for r in x])
    with Doubled():  # torch sets it aside while a function of its own runs, such as this one
        (wanted,) = torch.autograd.grad(rows.sum(), x)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], wanted)
