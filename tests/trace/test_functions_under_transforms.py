"""Functions without a rule for `torch.func.vmap`, in maps that transforms stand around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardmap
from tests.same import assert_same
from tests.trace.test_own_backwards import WAYS, W, batch

Tensor = torch.Tensor
Function = Callable[[Tensor, Tensor], Tensor]


class Square(torch.autograd.Function):
    """A square with seven times its gradient, and no word of how to map it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 14 * ctx.saved_tensors[0]


FUNCTIONS: dict[str, Function] = {
    "of the sample": lambda w, r: Square.apply(r * w) * r,
    "of what is shared": lambda w, r: Square.apply(w) * r,
    "twice": lambda w, r: Square.apply(Square.apply(r * w)),
    "in an inner gradient": lambda w, r: torch.func.grad(lambda q: Square.apply(q * w).sum())(r),
}

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "grad": lambda h: torch.func.grad(lambda w: h(w).sin().sum()),
    "jacrev": torch.func.jacrev,
    "jacrev of grad": lambda h: torch.func.jacrev(torch.func.grad(lambda w: h(w).sin().sum())),
    "vjp": lambda h: lambda w: torch.func.vjp(h, w)[1](torch.ones(5, 3, dtype=w.dtype))[0],
    "jacrev of shardmap": shardmap.jacrev,
}


@pytest.mark.parametrize("way", [w for w in WAYS if w != "chunks_of_one"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_are_those_of_the_loop(transform: str, way: str) -> None:
    x, w = batch(5, False), W.detach()
    for name, function in FUNCTIONS.items():

        def by_loop(w: Tensor, function: Function = function) -> Tensor:
            return torch.stack([function(w, r) for r in x])

        def by_map(w: Tensor, function: Function = function) -> Tensor:
            return shardmap.vmap(lambda r: function(w, r), **WAYS[way])(x)

        found = TRANSFORMS[transform](by_map)(w)
        assert_same(found, TRANSFORMS[transform](by_loop)(w), f"{name}, {transform}")
