"""Python state that hooks, objects on `ctx` and called functions read, changed before a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardmap
from shardmap import errors
from tests.same import assert_same
from tests.trace.test_own_backwards import WAYS, W, batch

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]


class Holder:
    """An object with a number."""

    def __init__(self) -> None:
        self.scale = 1.0

    def doubled(self, grad: Tensor) -> Tensor:
        return grad * self.scale

    def __call__(self, grad: Tensor) -> Tensor:
        return grad * self.scale

    @property
    def strength(self) -> float:
        return self.scale


HOLDER = Holder()


def helper(grad: Tensor) -> Tensor:
    return deeper(grad)


def deeper(grad: Tensor) -> Tensor:
    return grad * HOLDER.scale


class OnContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, holder: Holder) -> Tensor:
        ctx.holder = holder
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.holder.scale, None


class ByAMethod(OnContext):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.holder.doubled(grad), None


class ByAFunction(OnContext):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return helper(grad), None


def hooked(hook: Callable[[Tensor], Tensor]) -> Function:
    def function(r: Tensor) -> Tensor:
        y = r * W
        y.register_hook(hook)
        return y * 1

    return function


def of_a_lambda(h: Holder) -> Function:
    return hooked(lambda g: g * h.scale)


def of_a_method(h: Holder) -> Function:
    return hooked(h.doubled)


def of_a_property(h: Holder) -> Function:
    return hooked(lambda g: g * h.strength)


def of_an_object(h: Holder) -> Function:
    return hooked(h)


def of_a_partial(h: Holder) -> Function:
    return hooked(functools.partial(lambda own, g: g * own.scale, h))


def of_a_default(h: Holder) -> Function:
    def hook(g: Tensor, own: Holder = h) -> Tensor:
        return g * own.scale

    return hooked(hook)


def of_a_dictionary(h: Holder) -> Function:
    holders = {"one": h}
    return hooked(lambda g: g * holders["one"].scale)


def made_in_the_function(h: Holder) -> Function:
    def function(r: Tensor) -> Tensor:
        y = r * W
        y.register_hook(lambda g: g * h.scale)
        return y * 1

    return function


def on_ctx(h: Holder) -> Function:
    return lambda r: OnContext.apply(r * W, h)


def by_a_method(h: Holder) -> Function:
    return lambda r: ByAMethod.apply(r * W, h)


def of_a_module(h: Holder) -> Function:
    class Net(nn.Module):
        def forward(self, r: Tensor) -> Tensor:
            y = r * W
            y.register_hook(self.scaled)
            return y * 1

        def scaled(self, g: Tensor) -> Tensor:
            return g * h.scale

    return Net()


READERS = [
    of_a_lambda, of_a_method, of_a_property, of_an_object, of_a_partial, of_a_default,
    of_a_dictionary, made_in_the_function, on_ctx, by_a_method, of_a_module,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("made", READERS, ids=lambda f: f.__name__)
def test_a_change_is_refused_and_without_one_it_is_the_loops(
    made: Callable[[Holder], Function], way: str
) -> None:
    x, holder = batch(5, True), Holder()
    mapped = shardmap.vmap(made(holder), **WAYS[way])
    for value in (1.0, 2.0):  # changed before the map: read anew
        holder.scale = value
        (got,) = torch.autograd.grad(mapped(x).sum(), x)
        assert_same(got, value * W.detach().expand(5, 3), f"{value}")
    out = mapped(x).sum()
    holder.scale = 3.0
    with pytest.raises(errors.AutogradFunctionError, match=r"scale.* \(2.0 then, 3.0 now\)"):
        torch.autograd.grad(out, x)


@pytest.mark.parametrize("way", WAYS)
def test_what_called_functions_read(way: str) -> None:
    x, HOLDER.scale = batch(5, True), 1.0
    mapped = shardmap.vmap(lambda r: ByAFunction.apply(r * W, HOLDER), **WAYS[way])
    out = mapped(x).sum()
    (got,) = torch.autograd.grad(out, x, retain_graph=True)
    assert_same(got, W.detach().expand(5, 3), "unchanged")
    HOLDER.scale = 2.0
    with pytest.raises(errors.AutogradFunctionError, match=r"HOLDER.scale \(1.0 then, 2.0 now\)"):
        torch.autograd.grad(out, x)


@pytest.mark.parametrize("way", WAYS)
def test_variables_that_are_bound_anew(way: str) -> None:
    x, scale = batch(5, True), 1.0

    def function(r: Tensor) -> Tensor:
        y = r * W
        y.register_hook(lambda g: g * scale)
        return y * 1

    out = shardmap.vmap(function, **WAYS[way])(x).sum()
    scale = 2.0
    with pytest.raises(errors.AutogradFunctionError, match=r"scale \(1.0 then, 2.0 now\)"):
        torch.autograd.grad(out, x)


@pytest.mark.parametrize("way", WAYS)
def test_the_remedies_of_a_hook(way: str) -> None:
    x, holder = batch(5, True), Holder()

    def function(r: Tensor) -> Tensor:
        y, scale = r * W, holder.scale
        y.register_hook(lambda g: g * scale)
        return y * 1

    mapped = shardmap.vmap(function, **WAYS[way])
    for value in (2.0, 3.0):
        holder.scale = value
        out = mapped(x).sum()
        holder.scale = 5.0
        (got,) = torch.autograd.grad(out, x)
        assert_same(got, value * W.detach().expand(5, 3), f"{value}")


@pytest.mark.parametrize("way", WAYS)
def test_tensors_of_the_sample_in_a_hook_are_no_state(way: str) -> None:
    x = batch(5, True)

    def function(r: Tensor) -> Tensor:
        y, seen = r * W, [r.cos()]
        sizes = {"n": r.numel()}
        y.register_hook(lambda g: g * seen[0] * r / sizes["n"])
        return y * 1

    mapped = shardmap.vmap(function, **WAYS[way])
    for _ in range(2):
        (got,) = torch.autograd.grad(mapped(x).sum(), x)
        (wanted,) = torch.autograd.grad(torch.stack([function(r) for r in x]).sum(), x)
        assert_same(got, wanted, way)


def test_hooks_of_one_code_in_several_maps_each_see_their_own() -> None:
    x, holders = batch(5, True), [Holder() for _ in range(3)]
    maps = [shardmap.vmap(made_in_the_function(h), trace="once") for h in holders]
    for mapped in maps:
        mapped(x)
    out = maps[0](x).sum()
    holders[0].scale = 2.0
    with pytest.raises(errors.AutogradFunctionError, match=r"h.scale \(1.0 then, 2.0 now\)"):
        torch.autograd.grad(out, x)
