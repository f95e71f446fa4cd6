"""An optimizer that takes a step inside a map, which is refused, is as it was before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from shardmap import errors

Tensor = torch.Tensor
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class Own(torch.optim.Optimizer):
    """An optimizer of a user, which counts in python and keeps a list."""

    def __init__(self, params: list[torch.nn.Parameter]):
        super().__init__(params, {"lr": 0.1, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state.setdefault("norms", []).append(1.0)
                p.add_(p.grad, alpha=-group["lr"])


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p),
    "Adam, each": lambda p: torch.optim.Adam(p, foreach=False),
    "Adam, fused": lambda p: torch.optim.Adam(p, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "own": Own,
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_state_is_as_before(name: str, steps: int) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([weight])

    def step(r: Tensor) -> Tensor:
        weight.grad = (r * 2).detach()
        optimizer.step()
        return (weight * r).sum()

    for _ in range(steps):
        step(x[0])
    weight.grad = None
    before, value = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    held = [id(entries) for entries in optimizer.state.values()]
    for _ in range(2):
        with pytest.raises(errors.CapturedWriteError):
            shardmap.vmap(step)(x)
        assert str(optimizer.state_dict()) == str(before)
        assert [id(entries) for entries in optimizer.state.values()] == held
        assert torch.equal(weight, value)
        assert weight.grad is None
    other = torch.nn.Parameter(value.clone())
    fresh = OPTIMIZERS[name]([other])
    fresh.load_state_dict(before)
    other.grad = (x[1] * 2).detach()
    fresh.step()
    step(x[1])  # goes on from there
    torch.testing.assert_close(weight, other)
