"""Hooks on tensors that are made inside, under several derivatives around the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, jvp

import shardmap
from shardmap import errors
from tests.trace.ways import WAYS

Tensor = torch.Tensor
WEIGHT = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)


class Doubled(torch.autograd.Function):
    """The hook as a Function's backward, which every derivative calls."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def hooked(weight: Tensor, r: Tensor) -> Tensor:
    h = (r * weight).sin()
    if h.requires_grad:
        h.register_hook(lambda g: g * 2)
    return h * r


def written(weight: Tensor, r: Tensor) -> Tensor:
    return Doubled.apply((r * weight).sin()) * r


def twice(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return grad(lambda z: grad(lambda y: f(y).sum())(z).square().sum())(x)


def once(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return grad(lambda y: f(y).sum())(x)


def along(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return jvp(grad(lambda y: f(y).sum()), (x,), (x.cos(),))[1]


def loop(function: Callable[..., Tensor], weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([function(weight, r) for r in x])


def mapped(
    function: Callable[..., Tensor], weight: Tensor, way: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    return shardmap.vmap(lambda r: function(weight, r), **way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("derivative", [once, along])
def test_one_derivative_by_reverse_mode(derivative: Callable[..., Tensor], way: Any) -> None:
    for size in (1, 3, 7):
        x = torch.linspace(0, 1, 4 * size, dtype=torch.float64).view(size, 4)
        found = derivative(mapped(hooked, WEIGHT, way), x)
        torch.testing.assert_close(found, derivative(loop(hooked, WEIGHT), x))


@pytest.mark.parametrize("way", WAYS)
def test_several_are_refused_and_the_remedies_work(way: dict[str, Any]) -> None:
    x = torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4)
    weight = WEIGHT.clone().requires_grad_()
    with pytest.raises(errors.TransformError, match="each would call the hook"):
        twice(mapped(hooked, WEIGHT, way), x)
    with pytest.raises(errors.TransformError, match="each would call the hook"):
        once(mapped(hooked, weight, way), x)

    wanted = once(loop(hooked, WEIGHT), x)
    with torch.no_grad():
        torch.testing.assert_close(once(mapped(hooked, weight, way), x), wanted)
    torch.testing.assert_close(once(mapped(hooked, weight.detach(), way), x), wanted)
    found = twice(mapped(written, WEIGHT, way), x)
    torch.testing.assert_close(found, twice(loop(written, WEIGHT), x))
