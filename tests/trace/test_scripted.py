"""Code of TorchScript: the same operators at each call, whatever its optimiser makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardmap
from tests.call.ways import WAYS

Function = Callable[..., Tensor]
CURVATURE = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)


def signed(x: Tensor, k: Tensor) -> Tensor:
    sign = torch.masked_fill(k.sign(), k.isclose(torch.zeros_like(k)), 0.0)
    if bool(torch.all(sign < 0)):
        return (x * k.abs().sqrt()).clamp(-15, 15).tanh() / k.abs().sqrt()
    return (x * k.abs().sqrt()).tan() / k.abs().sqrt()


def unrolled(x: Tensor, k: Tensor) -> Tensor:
    for i in range(3):
        x = (x * 0.5 + float(i)).sin() + x.sigmoid() * x
    return x * k


def by_value(x: Tensor, k: Tensor) -> Tensor:
    if bool(x.sum() > 0):
        return x.exp() * k
    return x * 3


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        return self.linear(x).tanh() * x * k


def inside(f: Function) -> Function:
    return lambda r, k: torch.func.grad(lambda q: f(q, k).sum())(r)


def scripted(f: Any) -> Any:
    return torch.jit.script(f)


def traced(f: Any) -> Any:
    return torch.jit.trace(f, (torch.zeros(4, dtype=torch.float64), CURVATURE.detach()))


torch.manual_seed(0)
MODULE = Gated().double()
FUNCTIONS: dict[str, tuple[Function, Callable[[], Function]]] = {
    "a branch on what is captured": (signed, lambda: scripted(signed)),
    "a loop": (unrolled, lambda: scripted(unrolled)),
    "a branch on the sample": (by_value, lambda: scripted(by_value)),
    "a module": (MODULE, lambda: scripted(MODULE)),
    "a traced function": (unrolled, lambda: traced(unrolled)),
    "a traced module": (MODULE, lambda: traced(MODULE)),
    "a gradient inside": (inside(signed), lambda: inside(scripted(signed))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_equals_the_loop(name: str, way: str) -> None:
    """Values and gradients from outside, in more calls than the optimiser takes to profile.

    The loop is over the same code in python.
    """
    f, make = FUNCTIONS[name]
    same = make()
    shared = [CURVATURE, *(MODULE.parameters() if f is MODULE else ())]
    mapped = shardmap.vmap(lambda r: same(r, CURVATURE), **WAYS[way])
    for size in (1, 7, 3, 3, 7, 2):
        x = torch.randn(size, 4, dtype=torch.float64, requires_grad=True)
        found, expected = mapped(x), torch.stack([f(r, CURVATURE) for r in x])
        torch.testing.assert_close(found, expected)
        weight = torch.randn_like(expected)
        gradients = [
            torch.autograd.grad((y * weight).sum(), [x, *shared], materialize_grads=True)
            for y in (found, expected)
        ]
        torch.testing.assert_close(*gradients)


def test_the_optimiser_is_as_it_was() -> None:
    before = torch._C._get_graph_executor_optimize()
    seen = []

    def fails(r: Tensor) -> Tensor:
        seen.append(1)
        raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        shardmap.vmap(fails)(torch.ones(3))
    assert seen
    assert torch._C._get_graph_executor_optimize() is before
