"""A checkpoint around a map makes its call again in backward, when more is known of its paths.

Torch's checkpoint tells what is saved by its order and form alone: results that are saved in
another order would be handed to other samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import shardmap

pytestmark = pytest.mark.filterwarnings("ignore::shardmap.errors.SlowLoopWarning")
W = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)


def by_number(a: Tensor) -> Tensor:
    return a * a[0].item() * W


def two_ways(a: Tensor) -> Tensor:
    return a.sin() * W if a.sum() > 0 else a.cos() * W


def three_ways(a: Tensor) -> Tensor:
    if a.sum() > 1:
        return a.exp() * W
    return a.sin() - W if a.sum() > -1 else a * W.square()


def halved(a: Tensor) -> Tensor:
    while a.abs().sum() > 0.5:
        a = a * 0.5
    return a.sin() * W


def by_place(a: Tensor) -> Tensor:
    return (a[int(a.argmax())] ** 2 * W).sum()


def by_mask(a: Tensor) -> Tensor:
    return (a[a > 0].square().sum() * W).sum()


def plain(a: Tensor) -> Tensor:
    return a.tanh() * W


def with_a_map_inside(a: Tensor) -> Tensor:
    return shardmap.vmap(lambda b: b.sin() * W if b > 0 else b.cos() * W.square())(a)


FUNCTIONS = [by_number, two_ways, three_ways, halved, by_place, by_mask, plain, with_a_map_inside]
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
    "chunks": {"chunk_size": 3},
    "two lanes": {"chunk_size": 2, "devices": ["cpu", "cpu"]},
    "remat": {"chunk_size": 2, "remat": True},
    "remat, once": {"chunk_size": 3, "remat": True, "trace": "once"},
}


def loop(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([f(r) for r in x])


def gradients(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = run(x)
    weight = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).sin()
    return torch.autograd.grad((y * weight).sum(), [x, W])


AROUND = [(way, True) for way in WAYS] + [(way, False) for way in WAYS if "remat" in way]
"""Ways, each with True for a checkpoint around the map; without one, what remat computes again."""


@pytest.mark.parametrize(("way", "around"), AROUND)
@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [1, 4, 5, 12, pytest.param(70, marks=pytest.mark.rotating)])
def test_gradients_are_the_loops(
    f: Callable[[Tensor], Tensor], way: str, size: int, around: bool
) -> None:
    shardmap.clear_caches()
    mapped = shardmap.vmap(f, **WAYS[way])

    def run(x: Tensor) -> Any:
        return checkpoint(mapped, x, use_reentrant=False) if around else mapped(x)

    for call in range(4):
        x = torch.randn(size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(call))
        torch.testing.assert_close(gradients(run, x), gradients(loop(f), x))


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_gradients_after_other_calls(f: Callable[[Tensor], Tensor]) -> None:
    """Between the call and its gradient the same map is called on other samples."""
    mapped = shardmap.vmap(f)
    for _ in range(3):
        batches = torch.randn(3, 6, 2, dtype=torch.float64).requires_grad_()
        x = batches[0].detach().requires_grad_()
        y: Any = checkpoint(mapped, x, use_reentrant=False)
        for other in batches[1:]:
            mapped(other)
        weight = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()
        found = torch.autograd.grad((y * weight).sum(), [x, W])
        expected = torch.autograd.grad((loop(f)(x) * weight).sum(), [x, W])
        torch.testing.assert_close(found, expected)
