"""Functions that write in place to views, to samples and to what has views, against the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from tests.loop import loop
from tests.same import assert_same
from tests.trace.own_functions import Dirty

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]

DTYPE = torch.float64
CALLS = 4
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"chunk_size": 2},
    "lanes": {"devices": ["cpu", "cpu"], "chunk_size": 2},
    "once": {"trace": "once"},
    "each": {"trace": "each"},
}

torch.manual_seed(0)
LINEAR = nn.Linear(4, 4, dtype=DTYPE)
W = torch.randn(4, dtype=DTYPE, requires_grad=True)


class DirtyWithWeights(torch.autograd.Function):
    """Writes into its argument, and differentiates by another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0] * 10, grads[0] * 3


def a_part(r: Tensor, copied: bool) -> Tensor:
    y = r.sin()
    part = y[1:3]
    z = Dirty.apply(part.clone() if copied else part)
    return torch.cat([y[:1], z, y[3:]]) if copied else y


def an_older_view(r: Tensor, copied: bool) -> Tensor:
    y = r * 1
    view = y[1:3]
    z = Dirty.apply(y.clone() if copied else y)
    return (z[1:3] if copied else view).sin().sum() * z


def an_older_view_and_a_write(r: Tensor, copied: bool) -> Tensor:
    y = r * 1
    view = y[1:3]
    z = Dirty.apply(y.clone() if copied else y)
    z.mul_(3)
    return (z[1:3] if copied else view).sum() * z


def of_weights(r: Tensor, copied: bool) -> Tensor:
    y = torch.cat([r, r])[2:6]
    return DirtyWithWeights.apply(y.clone() if copied else y, W) * r


def given(value: Tensor, copied: bool) -> Tensor:
    return value.clone() if copied else value


REFUSED: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "a linear layer": lambda r, copied: Dirty.apply(given(LINEAR(r), copied)).sin(),
    "view": lambda r, copied: Dirty.apply(given((r * 1).view(2, 2), copied)).exp(),
    "unsqueeze": lambda r, copied: Dirty.apply(given((r * 1).unsqueeze(0), copied)).exp(),
    "the sample": lambda r, copied: Dirty.apply(given(r, copied)).sin(),
    "a part": a_part,
    "an older view": an_older_view,
    "an older view and a write": an_older_view_and_a_write,
    "of weights": of_weights,
}


def gradients(mapped: Function, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = mapped(x)
    wanted = [x, W, *LINEAR.parameters()]
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), wanted, materialize_grads=True)]


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, dtype=DTYPE, generator=g) for n in (5, 5, 3, 7, 5)[: CALLS + 1]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_such_a_function_is_refused_and_a_copy_is_the_loops(name: str, way: str) -> None:
    function = REFUSED[name]
    mapped = shardmap.vmap(lambda r: function(r, False), **WAYS[way])
    for x in batches():
        with pytest.raises(errors.AutogradFunctionError, match="mark_dirty"):
            gradients(mapped, x)
    copied = lambda r: function(r, True)
    mapped = shardmap.vmap(copied, **WAYS[way])
    for number, x in enumerate(batches()):
        want = gradients(loop(copied), x)
        for got, right in zip(gradients(mapped, x), want, strict=True):
            assert_same(got, right, f"{name}, call {number}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [n for n in REFUSED if n not in ("the sample", "of weights")])
def test_a_gradient_inside_is_the_loops(name: str, way: str) -> None:
    def inside(r: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = r.detach().requires_grad_()
            return torch.autograd.grad(REFUSED[name](leaf, False).sin().sum(), leaf)[0]

    mapped = shardmap.vmap(inside, **WAYS[way])
    for number, x in enumerate(batches()):
        assert_same(mapped(x), loop(inside)(x), f"{name}, call {number}")


@pytest.mark.parametrize("shared", [False, True])
def test_the_history_of_a_batch_is_not_lost(shared: bool) -> None:
    """In the loop the batch itself has the Function in its history."""

    def function(r: Tensor) -> Tensor:
        out = DirtyWithWeights.apply(r, W)
        return W * 2 if shared else out * 2

    x = batches()[0]
    for options in WAYS.values():
        with pytest.raises(errors.AutogradFunctionError, match="mapped argument"):
            shardmap.vmap(function, **options)(x.clone().requires_grad_() * 1)


def lists(r: Tensor) -> Tensor:
    y = r * 1
    torch.ops.aten._foreach_mul_.Scalar([y[:2], y[2:]], 2.0)
    torch.ops.aten._foreach_add_.List([y[:1], y[1:]], [r[:1], r[1:]])
    return y


def places(r: Tensor) -> Tensor:
    y = r * 1
    y[1:3] = 0
    y[r > 0] = r.sum()
    y[r.argmax()] = 3.0
    y[1:][torch.tensor([0])] = r[:1]
    return y


def shapes(r: Tensor) -> Tensor:
    y = r * 1
    y[:2].unsqueeze_(0).mul_(2)
    y.view(2, 2).t_().add_(r.view(2, 2))
    y.view(2, 2).fill_diagonal_(0.5)
    y[None].copy_(y[None].exp())
    return y


def modules(r: Tensor) -> Tensor:
    y = nn.functional.relu_(LINEAR(r)) + nn.functional.leaky_relu_(LINEAR(r))
    return nn.functional.silu((y * 1)[1:], inplace=True)


def twice(r: Tensor) -> Tensor:
    y = r * 1
    (g,) = torch.autograd.grad(lists(y).sin().sum(), y, create_graph=True)
    y[1:].mul_(g[1:])
    return y


def before_and_after(r: Tensor) -> Tensor:
    y = r * 1
    y[1:].mul_(2)
    z = Dirty.apply(y * 1)
    z[:2].mul_(r[:2])
    return z * y


SERVED: dict[str, Function] = {
    "lists": lists,
    "places": places,
    "shapes": shapes,
    "modules": modules,
    "twice": twice,
    "before and after": before_and_after,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SERVED)
def test_writes_by_torchs_operators_are_followed(name: str, way: str) -> None:
    mapped = shardmap.vmap(SERVED[name], **WAYS[way])
    for number, x in enumerate(batches()):
        want = gradients(loop(SERVED[name]), x)
        for got, right in zip(gradients(mapped, x), want, strict=True):
            assert_same(got, right, f"{name}, call {number}")
