"""Backwards that read `.training` of torch's modules, or that are replaced, before the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardmap
from shardmap import errors
from tests.loop import loop
from tests.same import assert_same

Tensor = torch.Tensor
Function = torch.autograd.Function

DTYPE = torch.float64
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"chunk_size": 2},
    "lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
}
MODULES: dict[str, nn.Module] = {
    "Linear": nn.Linear(2, 2),
    "Sequential": nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
    "Dropout": nn.Dropout(),
}
KEY = "training"


def reading(ask: Callable[[], bool]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions that ask for a flag when their gradient is taken."""

    class Asks(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * (2 if ask() else 1)

    def hooked(r: Tensor) -> Tensor:
        h = r * 1
        if h.requires_grad:
            h.register_hook(lambda g: g * (2 if ask() else 1))
        return h * 1

    def checkpointed(r: Tensor) -> Tensor:
        inside = lambda z: (z * (2 if ask() else 1)).sin()
        return checkpoint(inside, r, use_reentrant=False)

    return {"a backward": Asks.apply, "a hook": hooked, "a checkpoint": checkpointed}


def gradient(mapped: Callable[[Tensor], Tensor], change: Callable[[], object]) -> Tensor:
    x = torch.linspace(-1, 1, 15, dtype=DTYPE).view(5, 3).requires_grad_()
    out = mapped(x)
    change()
    return torch.autograd.grad(out.sum(), x)[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_a_flag_that_changes_before_the_gradient_is_refused(name: str, way: str) -> None:
    module = MODULES[name]
    asks = {
        "by name": lambda: module.training,
        "by getattr": lambda: getattr(module, KEY),
        "of all": lambda: all(m.training for m in module.modules()),
    }
    for how, ask in asks.items():
        for what, function in reading(ask).items():
            mapped = shardmap.vmap(function, **WAYS[way])
            for train in (True, False, True, True):
                module.train(train)
                want = gradient(loop(function), lambda: None)
                assert_same(gradient(mapped, lambda: None), want, f"{what}, {how}")
            with pytest.raises(errors.AutogradFunctionError, match="has changed"):
                gradient(mapped, module.eval)


@pytest.mark.parametrize("way", WAYS)
def test_modules_that_nobody_asks_may_change(way: str) -> None:
    """`.eval()` between a map and its gradient matters only to what reads it."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).to(DTYPE)
    function = lambda r: checkpoint(module, r, use_reentrant=False)
    mapped = shardmap.vmap(function, **WAYS[way])
    for _ in range(4):
        got, want = (gradient(m, module.train(True).eval) for m in (mapped, loop(function)))
        assert_same(got, want, "a checkpoint of modules without such a question")


SCALE = {"k": 2.0}


class Replaced(Function):
    """Its backward is replaced by others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 3


class WithVjp(Function):
    """Defines `vjp`, as autograd calls a backward too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def vjp(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * SCALE["k"]


def _times(k: float) -> Any:
    return staticmethod(lambda ctx, g: g * k)


def _replaced(kind: type, name: str, numbers: Iterator[int]) -> Callable[[], None]:
    return lambda: setattr(kind, name, _times(next(numbers)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "name"), [(Replaced, "backward"), (WithVjp, "vjp")])
def test_a_backward_that_is_replaced_before_the_gradient_is_refused(
    kind: Any, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, name, vars(kind)[name])
    replace = _replaced(kind, name, iter(range(5, 100)))
    mapped = shardmap.vmap(lambda r: kind.apply(r), **WAYS[way])
    for _ in range(4):
        want = gradient(loop(kind.apply), lambda: None)
        assert_same(gradient(mapped, lambda: None), want, "as it is")
        with pytest.raises(errors.AutogradFunctionError, match="another function now"):
            gradient(mapped, replace)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_vjp_reads_is_compared(way: str) -> None:
    mapped = shardmap.vmap(lambda r: WithVjp.apply(r), **WAYS[way])
    for k in (2.0, 3.0, 3.0, 4.0):
        SCALE["k"] = k
        want = gradient(loop(WithVjp.apply), lambda: None)
        assert_same(gradient(mapped, lambda: None), want, f"times {k}")
        with pytest.raises(errors.AutogradFunctionError, match="has changed"):
            gradient(mapped, lambda: SCALE.update(k=9.0))


@pytest.mark.parametrize("way", [w for w in WAYS if w != "once"])
def test_the_seed_of_torch_is_compared(way: str) -> None:
    state = torch.get_rng_state()
    try:
        for function in reading(lambda: torch.initial_seed() % 2 == 0).values():
            mapped = shardmap.vmap(function, **WAYS[way])
            for seed in (2, 3, 4, 4):
                torch.manual_seed(seed)
                want = gradient(loop(function), lambda: None)
                assert_same(gradient(mapped, lambda: None), want, f"seed {seed}")
            with pytest.raises(errors.AutogradFunctionError, match="has changed"):
                gradient(mapped, lambda: torch.manual_seed(5))
    finally:
        torch.set_rng_state(state)
